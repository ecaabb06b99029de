# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work between threads of one process: one book, one lock."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from specforge_core.channel.queue_book import QueueBook
from specforge_core.contracts import CaptureBatch, ChannelError, SampleRef
from specforge_core.contracts.capture_queue import (
    CaptureQueue,
    Ending,
    Membership,
    NumberedLease,
    Result,
    Results,
    check_offer,
    check_refs,
)

T = TypeVar("T")

_Published = tuple[Sequence[SampleRef], str]


class MemoryQueue(CaptureQueue):
    """Nothing of it outlives the process."""

    def __init__(self) -> None:
        self._identity = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._book = QueueBook[_Published]()
        self._members: set[str] = set()

    def join(self, name: str) -> Membership:
        with self._changed:
            if name in self._members:
                raise ChannelError(f"{name} has joined already")
            self._members.add(name)
            self._changed.notify_all()
        return _MemoryMembership(name, self._leave)

    def _leave(self, name: str) -> None:
        with self._changed:
            self._members.discard(name)
            self._book.drop(name)
            self._changed.notify_all()

    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        check_offer(batches, above)
        with self._changed:
            self._book.offer(batches, above=above)
            self._changed.notify_all()

    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        with self._changed:
            if worker not in self._members:
                raise ChannelError(f"{worker} has not joined")
            return self._when(lambda: self._book.take(worker), timeout)

    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        check_refs(lease, refs)
        with self._changed:
            finished = self._book.finish(lease, (tuple(refs), signature))
            self._changed.notify_all()
        return finished is not None

    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        with self._changed:
            self._book.give_back(lease, instead=instead)
            self._changed.notify_all()

    def outstanding(self) -> Sequence[CaptureBatch]:
        with self._changed:
            return self._book.outstanding()

    def results(self, after: int, timeout: float) -> Results:
        with self._changed:
            found = self._when(lambda: self._book.results(after), timeout) or []
            return Results(
                identity=self._identity,
                results=[
                    Result(
                        position=item.position,
                        batch=item.lease.batch,
                        number=item.lease.number,
                        worker=item.lease.worker,
                        refs=item.payload[0],
                        signature=item.payload[1],
                    )
                    for item in found
                ],
                members=frozenset(self._members),
                session=self._book.session,
                ending=self._book.ending,
                outstanding=len(self._book.outstanding()),
            )

    def commit(self, position: int) -> None:
        with self._changed:
            self._book.commit(position)

    def end(self, ending: Ending) -> bool:
        with self._changed:
            ended = self._book.end(ending)
            self._changed.notify_all()
            return ended

    def close(self) -> None:
        pass

    def _when(self, look: Callable[[], T], timeout: float) -> T:
        """What there is, as soon as there is something; what there is at the end of the session, or of the time."""

        def found() -> T | bool:
            return look() or self._book.ending is not None

        there = self._changed.wait_for(found, timeout)
        return look() if isinstance(there, bool) else there


class _MemoryMembership(Membership):
    def __init__(self, name: str, leave: Callable[[str], None]) -> None:
        self._name = name
        self._leave = leave

    @property
    def name(self) -> str:
        return self._name

    def close(self) -> None:
        self._leave(self._name)
