# SPDX-License-Identifier: Apache-2.0
"""What the writers of a file channel published and no reader acked, and whether a reader lives to ack it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from specforge_core.contracts import ChannelFailed, InFlight, PeerDied, SampleRef
from specforge_core.features.channel_tails import READER_SUFFIX, WRITER_SUFFIX, ReaderTail, WriterTail

Ack = tuple[str, int]
"""Sample id and generation."""


class InFlightCount:
    """Counts refs and bytes, followed as the files grow. Of two generations of one sample, the later counts."""

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._writers: dict[Path, WriterTail] = {}
        self._readers: dict[Path, ReaderTail] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self._nbytes = 0

    def refresh(self) -> InFlight:
        """Take in what is new. Acks are read first, so that every ack's ref is found."""
        for path in self._directory.glob(f"*{READER_SUFFIX}"):
            if path not in self._readers:
                self._readers[path] = ReaderTail(path, timeout_seconds=self._timeout_seconds)
        early = Counter(ack for reader in self._readers.values() for ack in reader.read() if not self._ack(ack))
        for path in self._directory.glob(f"*{WRITER_SUFFIX}"):
            if path not in self._writers:
                self._writers[path] = WriterTail(path, timeout_seconds=self._timeout_seconds)
        for writer in self._writers.values():
            while records := writer.read():
                for ref in chain.from_iterable(map(writer.decode, records)):
                    self._publish(ref, early)
        return InFlight(len(self._held), self._nbytes)

    def _publish(self, ref: SampleRef, early: Counter[Ack]) -> None:
        """:param early: acks of refs that are yet to be read; one that was published twice is acked twice."""
        ack = (ref.sample_id, ref.generation)
        if early[ack]:
            early[ack] -= 1
            return
        nbytes = ref.nbytes
        self._nbytes += nbytes - self._held.get(ref.sample_id, (0, 0))[1]
        self._held[ref.sample_id] = (ref.generation, nbytes)

    def _ack(self, ack: Ack) -> bool:
        sample_id, acked = ack
        generation, nbytes = self._held.get(sample_id, (None, 0))
        if generation != acked:
            return False
        del self._held[sample_id]
        self._nbytes -= nbytes
        return True

    def close(self) -> None:
        for tail in (*self._writers.values(), *self._readers.values()):
            tail.close()


class ReaderWatch:
    """What became of the channel's readers since this watch began."""

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._readers: dict[Path, ReaderTail] = {}
        self._refresh(told=False)
        # Whoever read in an earlier session is nothing to this one.
        self._former = {path for path, reader in self._readers.items() if not reader.lives()}

    def raise_if_failed(self) -> None:
        """:raises ChannelFailed: a reader failed, and no other took its place."""
        self._refresh(told=True)
        for reader in self._current():
            if reader.failure is not None and not self._has_living():
                raise ChannelFailed(reader.failure, where=str(reader.path))

    def raise_if_dead(self) -> None:
        """:raises PeerDied: a reader ended without closing, and none lives."""
        if self._has_living():
            return
        self._refresh(told=True)  # what it said last, it said before it was seen dead
        for reader in self._current():
            if reader.state == "opened" and not self._has_living():
                raise PeerDied("the reading process died", where=str(reader.path), hint="see its log, then run again")

    def _has_living(self) -> bool:
        return any(reader.lives() for reader in self._current())

    def _current(self) -> Iterator[ReaderTail]:
        return (reader for path, reader in self._readers.items() if path not in self._former)

    def _refresh(self, *, told: bool) -> None:
        for path in self._directory.glob(f"*{READER_SUFFIX}"):
            if path not in self._readers:
                self._readers[path] = ReaderTail(path, timeout_seconds=self._timeout_seconds, told=told)
        for reader in self._readers.values():
            reader.read_state()

    def close(self) -> None:
        for tail in self._readers.values():
            tail.close()


def read_acks(directory: Path, *, timeout_seconds: float) -> set[Ack]:
    """Everything that any reader acked so far."""
    acks: set[Ack] = set()
    for path in directory.glob(f"*{READER_SUFFIX}"):
        tail = ReaderTail(path, timeout_seconds=timeout_seconds)
        try:
            acks.update(tail.read())
        finally:
            tail.close()
    return acks


def read_unacked(directory: Path, *, timeout_seconds: float) -> list[SampleRef]:
    """Every writer's refs that no reader acked, each writer's in order; of a sample's generations the last read."""
    acks = read_acks(directory, timeout_seconds=timeout_seconds)
    refs: dict[str, SampleRef] = {}
    for path in sorted(directory.glob(f"*{WRITER_SUFFIX}")):
        for ref in _read_refs(path, timeout_seconds=timeout_seconds):
            if (ref.sample_id, ref.generation) not in acks:
                refs.pop(ref.sample_id, None)
                refs[ref.sample_id] = ref
    return list(refs.values())


def _read_refs(path: Path, *, timeout_seconds: float) -> Iterator[SampleRef]:
    tail = WriterTail(path, timeout_seconds=timeout_seconds)
    try:
        while records := tail.read():
            yield from chain.from_iterable(map(tail.decode, records))
    finally:
        tail.close()
