# SPDX-License-Identifier: Apache-2.0
"""Refs as append-only files in a directory, which may be a shared mount: one file per writer, one per reader.

Nothing is ever rewritten. A writer appends to ``<name>.refs`` and syncs once per batch; the reader follows every such
file and appends what it trained to a file of its own, which the writers follow in turn. Each keeps its file locked, so
that the other side notices a process that died. A closed channel can be read again from the beginning.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    InFlight,
    PartContext,
    RefChannel,
    RefReader,
    RefWriter,
    SampleRef,
)
from specforge_core.features.channel_tails import (
    READER_SUFFIX,
    VERSION_FRAME,
    WRITER_SUFFIX,
    Liveness,
    Outstanding,
    WriterTail,
)
from specforge_core.features.identity import file_name_problem
from specforge_core.features.record_file import Record, RecordAppender, frame
from specforge_core.features.ref_codec import RefEncoder

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import FileChannelConfig

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05
_BEATS_PER_TIMEOUT = 4


class FileChannel(RefChannel):
    """A directory of record files."""

    def __init__(self, config: FileChannelConfig, context: PartContext) -> None:
        self._directory = config.path or context.directory / "refs"
        self._timeout_seconds = config.writer_timeout_seconds

    def writer(self, name: str) -> FileRefWriter:
        """:raises ChannelError: a name that cannot be a file's, or one that a living process writes under."""
        problem = file_name_problem(name)
        if problem:
            raise ChannelError(f"writer {name[:80]!r} cannot name a file: {problem}", where=str(self._directory))
        path = self._directory / (name + WRITER_SUFFIX)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            return FileRefWriter(path, timeout_seconds=self._timeout_seconds)
        except OSError as error:
            raise ChannelError(f"cannot be written: {error.strerror}", where=str(path)) from error

    def reader(self) -> FileRefReader:
        return FileRefReader(self._directory, timeout_seconds=self._timeout_seconds)


class FileRefWriter(RefWriter):
    """Appends refs to one file. Thread-safe.

    A thread touches the file now and then, so that readers on machines that do not see its lock know that it lives.
    """

    def __init__(self, path: Path, *, timeout_seconds: float) -> None:
        self._lock = threading.RLock()
        self._file = RecordAppender(path)
        self._opened = False
        self._ended = False
        self._stop = threading.Event()
        try:
            self._continue()
            self._outstanding = Outstanding(path.parent)
        except ChannelError:
            self._file.close()
            raise
        threading.Thread(
            target=_beat, args=(self._file, self._stop, timeout_seconds / _BEATS_PER_TIMEOUT), daemon=True
        ).start()

    def _continue(self) -> None:
        """Go on after what an earlier writer of this name left."""
        before = WriterTail(self._file.path)
        try:
            before.read()
            self._new = self._file.path.stat().st_size == 0
            self._encoder = RefEncoder(before.layouts)
        finally:
            before.close()
        # A closed file stays closed until there is something to add: opening it again must not unseal the channel.
        if not before.closed:
            self._append([])

    def publish(self, refs: Sequence[SampleRef]) -> None:
        with self._lock:
            self._follow_reader()
            encoder = self._encoder.copy()
            frames: list[bytes] = []
            for ref in refs:
                try:
                    layout, record = encoder.encode(ref)
                except ValueError as error:
                    raise ChannelError(str(error), where=str(self._file.path)) from error
                if layout is not None:
                    frames.append(frame("L", layout))
                frames.append(frame("R", record))
            if frames:
                self._append(frames)
                self._encoder = encoder

    def in_flight(self) -> InFlight:
        with self._lock:
            self._follow_reader()
            return self._outstanding.in_flight

    def published(self) -> list[SampleRef]:
        with self._lock:
            tail = WriterTail(self._file.path)
            try:
                return [tail.decode(record) for record in tail.read()]
            finally:
                tail.close()

    def close(self) -> None:
        self._end(frame("C", None) if self._opened else b"")

    def fail(self, reason: str) -> None:
        self._end(frame("F", reason))

    def _end(self, last: bytes) -> None:
        with self._lock:
            if self._ended:
                return
            if last:
                self._append([last])
            self._ended = True
            self._stop.set()
            self._outstanding.close()
            self._file.close()

    def _append(self, frames: list[bytes]) -> None:
        opening = [] if self._opened else [frame("O", [os.uname().nodename, os.getpid()])]
        version = [VERSION_FRAME] if self._new else []
        self._file.append([*version, *opening, *frames], durable=True)
        self._opened, self._new = True, False

    def _follow_reader(self) -> None:
        if self._ended:
            raise ChannelError("this writer was closed", where=str(self._file.path))
        self._outstanding.refresh()
        self._outstanding.raise_if_failed()


def _beat(file: RecordAppender, stop: threading.Event, seconds: float) -> None:
    with suppress(OSError, ValueError):  # the file was closed meanwhile
        while not stop.wait(seconds):
            file.beat()


class FileRefReader(RefReader):
    """Follows every writer's file. Thread-safe."""

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._lock = threading.RLock()
        self._writers: dict[Path, tuple[WriterTail, Liveness]] = {}
        self._pending: deque[tuple[WriterTail, Record]] = deque()
        self._generations: dict[str, int] = {}
        self._file: RecordAppender | None = None
        self._closed = False
        self._refresh()
        if not self._sealed:
            self._open_file()

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        deadline = time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        while True:
            with self._lock:
                self._refuse_closed()
                dead = self._dead_writers()  # before reading: what a dead writer published is then all there
                self._refresh()
                self._raise_if_failed()
                if self._pending or self._sealed:
                    return self._deliver(max_refs)
                self._raise_if_unfinished(dead)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return []
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def drained(self) -> bool:
        with self._lock:
            if not self._closed:
                self._refresh()
            return self._sealed and not self._pending

    @property
    def _sealed(self) -> bool:
        return bool(self._writers) and all(tail.closed for tail, _ in self._writers.values())

    def _refresh(self) -> None:
        """Take in what is new."""
        for path in sorted(self._directory.glob(f"*{WRITER_SUFFIX}")):
            if path not in self._writers:
                self._writers[path] = (WriterTail(path), Liveness(self._timeout_seconds))
                self._dead_writers()  # its lock must have been seen once
        for tail, _ in self._writers.values():
            self._pending.extend((tail, record) for record in tail.read())

    def _raise_if_failed(self) -> None:
        """:raises ChannelFailed: a writer said that it cannot go on."""
        for tail, _ in self._writers.values():
            if tail.failure is not None:
                raise ChannelFailed(tail.failure, where=f"writer {tail.owner}")

    def _dead_writers(self) -> list[WriterTail]:
        now = time.monotonic()
        return [tail for tail, liveness in self._writers.values() if not tail.closed and tail.is_dead(liveness, now)]

    def _raise_if_unfinished(self, dead: list[WriterTail]) -> None:
        """:raises ChannelFailed: a writer ended without closing, and everything published was delivered."""
        for tail in dead:
            if not tail.closed:
                raise ChannelFailed(
                    f"writer {tail.owner} died before it had published everything",
                    where=str(tail.path),
                    hint="see its log; run it again to go on",
                )

    def _deliver(self, max_refs: int) -> list[SampleRef]:
        refs = []
        for _ in range(min(max_refs, len(self._pending))):
            tail, record = self._pending.popleft()
            refs.append(tail.decode(record))
        self._generations.update((ref.sample_id, ref.generation) for ref in refs)
        return refs

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        with self._lock:
            self._refuse_closed()
            held = [sample_id for sample_id in sample_ids if sample_id in self._generations]
            acked = [(sample_id, self._generations.pop(sample_id)) for sample_id in held]
            if self._file is None and acked:
                self._open_file()
            if self._file is not None and acked:
                self._file.append([frame("A", [step, acked])], durable=False)

    def fail(self, reason: str) -> None:
        with self._lock:
            if self._file is not None and not self._closed:
                self._file.append([frame("F", reason)], durable=True)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._file is not None:
                self._file.append([frame("C", None)], durable=False)
                self._file.close()
            for tail, _ in self._writers.values():
                tail.close()

    def _open_file(self) -> None:
        """This reader's own file; it is complete and locked when it gets the name that writers look for.

        A sealed channel is read without one where its directory cannot be written: nobody waits for its acks.
        """
        path = self._directory / os.urandom(8).hex()
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = RecordAppender(path)
        except OSError as error:
            if not self._sealed:
                raise ChannelError(f"cannot be written: {error.strerror}", where=str(self._directory)) from error
            return
        self._file.append([VERSION_FRAME, frame("O", [os.uname().nodename, os.getpid()])], durable=False)
        self._file.rename(path.with_suffix(READER_SUFFIX))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelError("this reader was closed", where=str(self._directory))
