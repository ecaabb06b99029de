# SPDX-License-Identifier: Apache-2.0
"""The train side of a file channel: follows every writer's file and says in a file of its own what was trained."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from specforge_core.contracts import ChannelError, ChannelFailed, RefReader, SampleRef
from specforge_core.features.channel_tails import READER_SUFFIX, VERSION_FRAME, WRITER_SUFFIX, Liveness, WriterTail
from specforge_core.features.record_file import Record, RecordAppender, frame

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


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
