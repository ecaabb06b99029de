# SPDX-License-Identifier: Apache-2.0
"""The train side of a file channel: follows every writer's file and says in a file of its own what was trained."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from specforge_core.contracts import ChannelError, ChannelFailed, PeerDied, RefReader, SampleRef
from specforge_core.contracts.files import make_directory
from specforge_core.features.channel_tails import READER_SUFFIX, VERSION_FRAME, WRITER_SUFFIX, WriterTail
from specforge_core.features.file_lock import opened_by
from specforge_core.features.liveness import Heartbeat
from specforge_core.features.record_file import RecordAppender, frame
from specforge_core.features.unacked import read_acks

_ACKS_PER_RECORD = 4096
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class FileRefReader(RefReader):
    """Follows every writer's file. Thread-safe. Remembers what was delivered and is not acked, and nothing else."""

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._lock = threading.RLock()
        self._writers: dict[Path, WriterTail] = {}
        self._pending: deque[SampleRef] = deque()
        self._delivered: dict[str, tuple[int, ...]] = {}
        self._file: RecordAppender | None = None
        self._fault: ChannelError | None = None
        self._failed = False
        self._closed = False
        # Emptied as the refs that former readers acked are passed over.
        self._acked = read_acks(directory, timeout_seconds=timeout_seconds)
        self._find_writers(told=False)
        if not self._writers or not all(tail.ends_closed() for tail in self._writers.values()):
            self._open_file(needed=True)

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        deadline = time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        while True:
            with self._lock:
                self._refuse_closed()
                # Before reading: what a dead writer published is then all there.
                dead = {path for path, tail in self._writers.items() if tail.state == "opened" and tail.is_dead()}
                self._refresh(max_refs)
                self._raise_if_failed()
                if self._pending or self._sealed:
                    return self._deliver(max_refs)
                self._raise_if_abandoned(dead)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return []
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def drained(self) -> bool:
        with self._lock:
            if not self._closed:
                self._refresh(1)
            return self._sealed and not self._pending

    @property
    def _sealed(self) -> bool:
        """Right only while nothing is pending: then every file was read to its end."""
        return bool(self._writers) and all(tail.state == "closed" for tail in self._writers.values())

    def _find_writers(self, *, told: bool) -> None:
        for path in sorted(self._directory.glob(f"*{WRITER_SUFFIX}")):
            if path not in self._writers:
                self._writers[path] = WriterTail(path, timeout_seconds=self._timeout_seconds, told=told)

    def _refresh(self, wanted: int) -> None:
        """Read on. What stands after a record that cannot be read is never delivered: the error comes every time."""
        if self._fault is not None:
            raise self._fault
        try:
            self._read_on(wanted)
        except ChannelError as error:
            self._fault = error
            raise

    def _read_on(self, wanted: int) -> None:
        """Read a piece of every file, again and again, until ``wanted`` refs are pending or there is no more."""
        self._find_writers(told=True)
        news = True
        while news and len(self._pending) < wanted:
            news = False
            for tail in self._writers.values():
                for record in tail.read():
                    news = True
                    refs = tail.decode(record)
                    self._pending.extend([ref for ref in refs if not self._is_acked(ref)] if self._acked else refs)

    def _is_acked(self, ref: SampleRef) -> bool:
        ack = (ref.sample_id, ref.generation)
        if ack not in self._acked:
            return False
        self._acked.remove(ack)
        return True

    def _raise_if_failed(self) -> None:
        """:raises ChannelFailed: a writer said that it cannot go on."""
        for tail in self._writers.values():
            if tail.failure is not None:
                raise ChannelFailed(tail.failure, where=f"writer {tail.owner}")

    def _raise_if_abandoned(self, dead: set[Path]) -> None:
        """:raises PeerDied: a writer ended without closing, everything published was delivered, and no writer lives."""
        unfinished = [tail for tail in self._writers.values() if tail.state != "closed"]
        if unfinished and all(tail.state == "failed" or (tail.path in dead and tail.is_dead()) for tail in unfinished):
            raise PeerDied(
                f"writer {unfinished[0].owner} died before it had published everything, and no writer lives",
                where=str(unfinished[0].path),
                hint="see its log; run it again to go on",
            )

    def _deliver(self, max_refs: int) -> list[SampleRef]:
        refs = [self._pending.popleft() for _ in range(min(max_refs, len(self._pending)))]
        for ref in refs:
            self._delivered[ref.sample_id] = (*self._delivered.get(ref.sample_id, ()), ref.generation)
        return refs

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        with self._lock:
            self._refuse_closed()
            held = [sample_id for sample_id in sample_ids if sample_id in self._delivered]
            acked = [(sample_id, generation) for sample_id in held for generation in self._delivered[sample_id]]
            if not acked:
                return
            if self._file is None:
                self._open_file(needed=False)
            if self._file is not None:
                cut = [acked[first : first + _ACKS_PER_RECORD] for first in range(0, len(acked), _ACKS_PER_RECORD)]
                self._file.append([frame("A", [step, some]) for some in cut], durable=False)
            for sample_id in held:
                self._delivered.pop(sample_id, None)

    def fail(self, reason: str) -> None:
        with self._lock:
            if self._file is not None and not self._closed and not self._failed:
                self._file.append([frame("F", reason)], durable=True)
                self._failed = True

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._file is not None:
                self._heartbeat.stop()
                if not self._failed:
                    self._file.append([frame("C", None)], durable=False)
                self._file.close()
            for tail in self._writers.values():
                tail.close()

    def _open_file(self, *, needed: bool) -> None:
        """This reader's own file; it is complete and locked when it gets the name that writers look for.

        A sealed channel is read without one where its directory cannot be written: nobody waits for its acks.
        """
        path = self._directory / secrets.token_hex(8)  # a name that nobody can have planted
        try:
            make_directory(self._directory)
            self._file = RecordAppender(path)
        except OSError as error:
            if needed:
                raise ChannelError(f"cannot be written: {error.strerror}", where=str(self._directory)) from error
            return
        self._file.append([VERSION_FRAME, frame("O", opened_by(self._file.domain))], durable=False)
        self._file.rename(path.with_suffix(READER_SUFFIX))
        self._heartbeat = Heartbeat(self._file, timeout_seconds=self._timeout_seconds)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelError("this reader was closed", where=str(self._directory))
