# SPDX-License-Identifier: Apache-2.0
"""Who may capture what, as a pure state machine: offers, holders, attempts and returns.

No clock, lock, thread or file inside: a desk of threads guards one book with a lock, and a desk of files replays the
same calls in every process. The same calls in the same order give the same book.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from specforge_core.contracts import CaptureBatch, Lease


@dataclass
class _Entry:
    batch: CaptureBatch
    attempt: int = 0
    holder: str | None = None


class LeaseBook:
    """Batches offered and not finished. What is finished leaves nothing behind."""

    def __init__(self) -> None:
        self.ended: str | None = None
        self._entries: dict[str, _Entry] = {}
        self._returned: deque[str] = deque()
        self._offered: deque[str] = deque()
        self._held: dict[str, dict[str, None]] = {}

    def offer(self, batch: CaptureBatch) -> bool:
        """Add a batch unless it is outstanding. Opens an ended book. Whether it was added."""
        self.ended = None
        if batch.key in self._entries:
            return False
        self._entries[batch.key] = _Entry(batch)
        self._offered.append(batch.key)
        return True

    def outstanding(self) -> list[CaptureBatch]:
        return [entry.batch for entry in self._entries.values()]

    def is_outstanding(self, batch: CaptureBatch) -> bool:
        return batch.key in self._entries

    @property
    def has_free(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._returned or self._offered)

    @property
    def holders(self) -> Sequence[str]:
        """Who holds a batch, in the order of their first."""
        return tuple(self._held)

    def take(self, holder: str) -> Lease | None:
        """What came back first, then the oldest offer."""
        queue = self._returned or self._offered
        if not queue:
            return None
        entry = self._entries[queue.popleft()]
        entry.attempt += 1
        entry.holder = holder
        self._held.setdefault(holder, {})[entry.batch.key] = None
        return self.lease(entry.batch.key)

    def lease(self, key: str) -> Lease | None:
        """The lease under which the batch of that key is held now."""
        entry = self._entries.get(key)
        if entry is None or entry.holder is None:
            return None
        return Lease(batch=entry.batch, holder=entry.holder, attempt=entry.attempt)

    def holds(self, lease: Lease) -> bool:
        """Whether the lease is still what it was when it was taken."""
        return self.lease(lease.batch.key) == lease

    def finish(self, lease: Lease) -> None:
        if self.holds(lease):
            self._let_go(self._entries.pop(lease.batch.key))

    def give_back(self, lease: Lease) -> None:
        """The batch comes back as if it had not been taken."""
        if self.holds(lease):
            entry = self._entries[lease.batch.key]
            entry.attempt -= 1
            self._bring_back(entry)

    def drop(self, holder: str) -> None:
        """A holder is gone: what it held comes back, in the order it was taken; the attempts count."""
        for key in list(self._held.get(holder, ())):
            self._bring_back(self._entries[key])

    def end(self, reason: str) -> None:
        """Withdraw everything."""
        self.ended = reason
        for held in (self._entries, self._returned, self._offered, self._held):
            held.clear()

    def _bring_back(self, entry: _Entry) -> None:
        self._let_go(entry)
        self._returned.append(entry.batch.key)

    def _let_go(self, entry: _Entry) -> None:
        holder, entry.holder = entry.holder, None
        assert holder is not None
        held = self._held[holder]
        del held[entry.batch.key]
        if not held:
            del self._held[holder]
