# SPDX-License-Identifier: Apache-2.0
"""Refs between threads of one process. Both halves of a run share one instance."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    InFlight,
    LeaseDesk,
    PartContext,
    PeerDied,
    RefChannel,
    RefReader,
    RefWriter,
    SampleRef,
    check_metadata_only,
)
from specforge_core.features.memory_leases import MemoryLeases

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import MemoryChannelConfig


@dataclass
class _WriterState:
    """``failure`` is told to the reader that was open when the writer failed, and to no later one."""

    status: Literal["open", "closed", "failed"] = "open"
    failure: str | None = None


class MemoryChannel(RefChannel):
    """A queue. Not replayable: a second reader gets what the first was not given."""

    def __init__(self, config: MemoryChannelConfig, context: PartContext) -> None:
        self._queue = _RefQueue()
        self._leases = MemoryLeases(self._queue.changed, lives=self._queue.has_open_writer)

    def writer(self, name: str) -> RefWriter:
        return _MemoryWriter(self._queue, name)

    def reader(self) -> RefReader:
        return _MemoryReader(self._queue)

    def leases(self) -> LeaseDesk:
        return self._leases

    def seal(self) -> None:
        with self._queue.changed:
            self._queue.seal()
            self._queue.changed.notify_all()


class _RefQueue:
    """What the two sides share; every method holds ``changed``."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.writers: dict[str, _WriterState] = {}
        self.reader_failure: str | None = None
        self.waiting: deque[SampleRef] = deque()
        self._held: dict[str, SampleRef] = {}
        self._delivered: dict[str, int] = {}
        self._nbytes = 0

    @property
    def sealed(self) -> bool:
        return bool(self.writers) and all(writer.status == "closed" for writer in self.writers.values())

    @property
    def in_flight(self) -> InFlight:
        return InFlight(len(self._held), self._nbytes)

    @property
    def unacked(self) -> list[SampleRef]:
        return list(self._held.values())

    def has_open_writer(self, name: str) -> bool:
        return name in self.writers and self.writers[name].status == "open"

    def append(self, ref: SampleRef) -> None:
        replaced = self._held.pop(ref.sample_id, None)
        self._nbytes += ref.nbytes - (replaced.nbytes if replaced else 0)
        self._held[ref.sample_id] = ref
        self.waiting.append(ref)

    def take(self, max_refs: int) -> list[SampleRef]:
        refs = [self.waiting.popleft() for _ in range(min(max_refs, len(self.waiting)))]
        self._delivered.update((ref.sample_id, ref.generation) for ref in refs)
        return refs

    def ack(self, sample_id: str) -> None:
        generation = self._delivered.pop(sample_id, None)
        held = self._held.get(sample_id)
        if held is not None and held.generation == generation:
            del self._held[sample_id]
            self._nbytes -= held.nbytes

    def seal(self) -> None:
        for writer in self.writers.values():
            if writer.status == "failed":
                writer.status, writer.failure = "closed", None

    def forget_failures(self) -> None:
        self.reader_failure = None
        for writer in self.writers.values():
            writer.failure = None

    def raise_if_reader_failed(self) -> None:
        if self.reader_failure is not None:
            raise ChannelFailed(self.reader_failure, where="reader")

    def raise_if_writer_failed(self) -> None:
        for name, writer in self.writers.items():
            if writer.failure is not None:
                raise ChannelFailed(writer.failure, where=f"writer {name}")

    def raise_if_abandoned(self) -> None:
        """:raises PeerDied: a writer ended without closing, before this reader came, and none is open."""
        failed = [name for name, writer in self.writers.items() if writer.status == "failed"]
        if failed and not any(self.has_open_writer(name) for name in self.writers):
            raise PeerDied("ended without closing, and no writer is open", where=f"writer {failed[0]}")


class _MemoryWriter(RefWriter):
    def __init__(self, queue: _RefQueue, name: str) -> None:
        self._queue = queue
        self._name = name
        self._ended = False
        with queue.changed:
            self._state = queue.writers.setdefault(name, _WriterState())
            self._state.status, self._state.failure = "open", None

    def publish(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            check_metadata_only(ref)
        with self._queue.changed:
            self._refuse_ended()
            self._queue.raise_if_reader_failed()
            for ref in refs:
                self._queue.append(ref)
            self._queue.changed.notify_all()

    def in_flight(self) -> InFlight:
        with self._queue.changed:
            self._refuse_ended()
            self._queue.raise_if_reader_failed()
            return self._queue.in_flight

    def published(self) -> list[SampleRef]:
        with self._queue.changed:
            return self._queue.unacked

    def close(self) -> None:
        self._end(failure=None)

    def fail(self, reason: str) -> None:
        self._end(failure=reason)

    def _end(self, *, failure: str | None) -> None:
        with self._queue.changed:
            if self._ended:
                return
            self._ended = True
            self._state.status = "closed" if failure is None else "failed"
            self._state.failure = failure
            self._queue.changed.notify_all()

    def _refuse_ended(self) -> None:
        if self._ended:
            raise ChannelError("this writer was closed", where=f"writer {self._name}")


class _MemoryReader(RefReader):
    def __init__(self, queue: _RefQueue) -> None:
        self._queue = queue
        self._closed = False
        with queue.changed:
            queue.forget_failures()

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        deadline = time.monotonic() + timeout
        with self._queue.changed:
            while True:
                self._refuse_closed()
                self._queue.raise_if_writer_failed()
                if self._queue.waiting or self._queue.sealed:
                    return self._queue.take(max_refs)
                self._queue.raise_if_abandoned()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return []
                self._queue.changed.wait(remaining)

    @property
    def drained(self) -> bool:
        with self._queue.changed:
            return self._queue.sealed and not self._queue.waiting

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        with self._queue.changed:
            self._refuse_closed()
            for sample_id in sample_ids:
                self._queue.ack(sample_id)

    def fail(self, reason: str) -> None:
        with self._queue.changed:
            if not self._closed:
                self._queue.reader_failure = reason

    def close(self) -> None:
        with self._queue.changed:
            self._closed = True
            self._queue.changed.notify_all()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelError("this reader was closed", where="reader")
