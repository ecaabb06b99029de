# SPDX-License-Identifier: Apache-2.0
"""What a file channel's files say, read as they grow: one view per writer's file and per reader's file.

Kinds of records: ``V`` format and version (first), ``O`` opened, ``L`` layout, ``R`` ref, ``A`` acks, ``C`` closed,
``F`` failed with a reason. The last of ``O``, ``C`` and ``F`` is the state of the file's owner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge_core.contracts import ChannelFailed, InFlight, SampleRef
from specforge_core.features.record_file import Record, RecordTail, frame
from specforge_core.features.ref_codec import RefDecoder

VERSION_FRAME = frame("V", ["specforge refs", 1])
WRITER_SUFFIX = ".refs"
READER_SUFFIX = ".acks"


class _OwnedTail:
    """A record file and the state of the process that owns it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail = RecordTail(path)
        self._versioned = False
        self.closed = False
        self.failure: str | None = None

    @property
    def owner(self) -> str:
        return self.path.stem

    def is_locked(self) -> bool:
        return self._tail.is_locked()

    def close(self) -> None:
        self._tail.close()

    def _read(self) -> list[Record]:
        """New records of the kinds that only one side writes; the owner's state is taken in here."""
        return [record for record in self._tail.read() if not self._is_state(record)]

    def _is_state(self, record: Record) -> bool:
        if not self._versioned:
            self._check_version(record)
            self._versioned = True
            return True
        if record.kind not in ("O", "C", "F"):
            return False
        body = record.body()
        self.closed = record.kind == "C"
        self.failure = str(body) if record.kind == "F" else None
        return True

    def _check_version(self, record: Record) -> None:
        body = record.body()
        if record.line + b"\n" != VERSION_FRAME:
            raise record.malformed(f"format {body}, this version reads ['specforge refs', 1]")


class WriterTail(_OwnedTail):
    """One writer's file: layouts are taken in at once, refs are handed out undecoded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._decoder = RefDecoder()

    @property
    def layouts(self) -> list[Any]:
        return self._decoder.layouts

    def read(self) -> list[Record]:
        """New ref records, in the order they were published."""
        refs = []
        for record in self._read():
            if record.kind == "R":
                refs.append(record)
            elif record.kind == "L":
                self._take(record)
            else:
                raise record.malformed(f"unknown kind {record.kind!r}")
        return refs

    def _take(self, record: Record) -> None:
        body = record.body()
        try:
            self._decoder.add_layout(body)
        except ValueError as error:
            raise record.malformed(str(error)) from error

    def decode(self, record: Record) -> SampleRef:
        body = record.body()
        try:
            return self._decoder.decode(body)
        except ValueError as error:
            raise record.malformed(str(error)) from error

    def is_dead(self, liveness: Liveness, now: float) -> bool:
        return liveness.is_dead(locked=self.is_locked(), heartbeat_ns=self._tail.heartbeat_ns(), now=now)


class ReaderTail(_OwnedTail):
    """One reader's file: the samples it acked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seen_locked = False

    def read(self) -> list[tuple[str, int]]:
        """Newly acked (sample id, generation)."""
        acked: list[tuple[str, int]] = []
        for record in self._read():
            body = record.body()
            if record.kind != "A" or type(body) is not list or len(body) != 2:
                raise record.malformed("not an ack")
            acked.extend((str(sample_id), int(generation)) for sample_id, generation in body[1])
        return acked


class Liveness:
    """Whether a file's owner lives, from what can be observed of the file. Pure: it is told the time.

    Where locks are seen, a lock that was held and is free means that the owner ended, whatever ended it. Where they
    are not (another machine, an owner that ended before the first look) a heartbeat that stood still for too long does.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._seen_locked = False
        self._heartbeat_ns = -1
        self._moved_at = 0.0

    def is_dead(self, *, locked: bool, heartbeat_ns: int, now: float) -> bool:
        if locked or heartbeat_ns != self._heartbeat_ns:
            self._heartbeat_ns = heartbeat_ns
            self._moved_at = now
        if locked:
            self._seen_locked = True
            return False
        return self._seen_locked or now - self._moved_at > self._timeout


class Outstanding:
    """What all writers of a channel published and no reader has acked, followed as the files grow."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[Path, WriterTail] = {}
        self._readers: dict[Path, ReaderTail] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._nbytes = 0
        self.refresh()
        # Readers of earlier sessions: their acks count, their failures do not.
        self._former = {path for path, reader in self._readers.items() if not reader.is_locked()}

    @property
    def in_flight(self) -> InFlight:
        return InFlight(len(self._held), self._nbytes)

    def refresh(self) -> None:
        """Take in what is new. Acks are read first, so that every ack's ref is found."""
        for path in self._directory.glob(f"*{READER_SUFFIX}"):
            if path not in self._readers:
                self._readers[path] = ReaderTail(path)
        acked = [ack for reader in self._readers.values() for ack in reader.read()]
        for path in self._directory.glob(f"*{WRITER_SUFFIX}"):
            if path not in self._writers:
                self._writers[path] = WriterTail(path)
        for writer in self._writers.values():
            for record in writer.read():
                self._publish(writer.decode(record))
        for sample_id, generation in acked:
            self._ack(sample_id, generation)

    def _publish(self, ref: SampleRef) -> None:
        self._nbytes += ref.nbytes - self._held.get(ref.sample_id, (0, 0))[1]
        self._held[ref.sample_id] = (ref.generation, ref.nbytes)

    def _ack(self, sample_id: str, generation: int) -> None:
        held, nbytes = self._held.get(sample_id, (-1, 0))
        if held == generation:
            del self._held[sample_id]
            self._nbytes -= nbytes

    def raise_if_failed(self) -> None:
        """:raises ChannelFailed: a reader of this session failed, or died."""
        dead, alive = [], False
        for path, reader in self._readers.items():
            if path not in self._former and reader.failure is not None:
                raise ChannelFailed(reader.failure, where=str(path))
            locked = reader.is_locked()
            reader.seen_locked |= locked
            alive |= locked
            if reader.seen_locked and not locked and not reader.closed:
                dead.append(path)
        if dead and not alive:
            raise ChannelFailed("the reading process died", where=str(dead[0]), hint="see its log, then run again")

    def close(self) -> None:
        for tail in (*self._writers.values(), *self._readers.values()):
            tail.close()
