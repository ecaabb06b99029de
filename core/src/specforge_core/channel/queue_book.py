# SPDX-License-Identifier: Apache-2.0
"""What is wanted, who has it and what came of it, as a pure state machine.

No clock, lock, thread or file inside: a queue of threads guards one book with a lock, a queue of files replays the same
calls in every process, a server mirrors it. The same calls in the same order give the same book.

A batch is outstanding from its offer to its result. Leases are numbered over the book's whole life, and only the last
one of a batch can finish it, so that whatever a worker does late, or twice, changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from specforge_core.contracts import CaptureBatch
from specforge_core.contracts.capture_queue import Ending, NumberedLease

Payload = TypeVar("Payload")


@dataclass(slots=True)
class _Entry:
    batch: CaptureBatch
    attempt: int = 0
    lease: NumberedLease | None = None


@dataclass(frozen=True, slots=True)
class Finished(Generic[Payload]):
    """A result as the book keeps it: the lease it was finished under, and what was handed in with it."""

    position: int
    lease: NumberedLease
    payload: Payload


class QueueBook(Generic[Payload]):
    """Batches offered, leased and finished; sessions and how they ended.

    :ivar number: of the last lease; ``session``: of the one that is open or ended last, 0 before the first.
    :ivar position: of the last result; ``committed``: up to which results are forgotten.
    """

    def __init__(self) -> None:
        self.number = 0
        self.session = 0
        self.ending: Ending | None = None
        self.position = 0
        self.committed = 0
        self._entries: dict[str, _Entry] = {}
        self._returned: deque[str] = deque()
        self._offered: deque[str] = deque()
        self._held: dict[str, dict[str, None]] = {}
        self._results: deque[Finished[Payload]] = deque()
        self._finished: dict[str, int] = {}

    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        """Add the batches that are neither outstanding nor finished and uncommitted; a new session where one ended."""
        if self.session == 0 or self.ending is not None:
            self.session += 1
            self.ending = None
        self.number = max(self.number, above)
        for batch in batches:
            if batch.key not in self._finished:
                self._add(batch)

    def _add(self, batch: CaptureBatch) -> None:
        if batch.key not in self._entries:
            self._entries[batch.key] = _Entry(batch)
            self._offered.append(batch.key)

    def outstanding(self) -> list[CaptureBatch]:
        return [entry.batch for entry in self._entries.values()]

    @property
    def has_free(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._returned or self._offered)

    @property
    def workers(self) -> Sequence[str]:
        """Who holds a batch, in the order of their first."""
        return tuple(self._held)

    def take(self, worker: str) -> NumberedLease | None:
        """What came back first, then the oldest offer."""
        queue = self._returned or self._offered
        if not queue:
            return None
        entry = self._entries[queue.popleft()]
        self.number += 1
        entry.attempt += 1
        entry.lease = NumberedLease(
            batch=entry.batch, worker=worker, number=self.number, attempt=entry.attempt, session=self.session
        )
        self._held.setdefault(worker, {})[entry.batch.key] = None
        return entry.lease

    def held(self, number: int) -> NumberedLease | None:
        """The lease of that number, while its worker has it."""
        leases = (self._entries[key].lease for keys in self._held.values() for key in keys)
        return next((lease for lease in leases if lease is not None and lease.number == number), None)

    def holds(self, lease: NumberedLease) -> bool:
        """Whether the lease is still its worker's."""
        entry = self._entries.get(lease.batch.key)
        return entry is not None and entry.lease is not None and entry.lease.number == lease.number

    def finish(self, lease: NumberedLease, payload: Payload) -> Finished[Payload] | None:
        """The result, or None where the lease was lost."""
        if not self.holds(lease):
            return None
        self._let_go(self._entries.pop(lease.batch.key))
        self.position += 1
        finished = Finished(self.position, lease, payload)
        self._results.append(finished)
        self._finished[lease.batch.key] = self._finished.get(lease.batch.key, 0) + 1
        return finished

    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        """The batch comes back as if it had not been taken, or parts of it in its place."""
        if not self.holds(lease):
            return
        entry = self._entries[lease.batch.key]
        self._let_go(entry)
        if not instead:
            entry.attempt -= 1
            self._returned.append(entry.batch.key)
            return
        del self._entries[lease.batch.key]
        for batch in instead:
            self._add(batch)

    def drop(self, worker: str) -> None:
        """A worker is gone: what it held comes back, in the order it was taken; the attempts count."""
        for key in list(self._held.get(worker, ())):
            self._let_go(self._entries[key])
            self._returned.append(key)

    def results(self, after: int) -> list[Finished[Payload]]:
        """Results with a higher position than ``after`` that are not committed, oldest first."""
        first = self.position - len(self._results) + 1
        return list(islice(self._results, max(after + 1 - first, 0), None))

    def commit(self, position: int) -> None:
        """Forget results up to this position."""
        while self._results and self._results[0].position <= position:
            key = self._results.popleft().lease.batch.key
            self._finished[key] -= 1
            if not self._finished[key]:
                del self._finished[key]
        self.committed = max(self.committed, min(position, self.position))

    def end(self, ending: Ending) -> bool:
        """Withdraw everything that is outstanding, if ``ending`` is of the session that is open."""
        if self.ending is not None or ending.session != self.session:
            return False
        self.ending = ending
        for withdrawn in (self._entries, self._returned, self._offered, self._held):
            withdrawn.clear()
        return True

    def _let_go(self, entry: _Entry) -> None:
        assert entry.lease is not None
        held = self._held[entry.lease.worker]
        del held[entry.batch.key]
        if not held:
            del self._held[entry.lease.worker]
        entry.lease = None
