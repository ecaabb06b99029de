# SPDX-License-Identifier: Apache-2.0
"""The lease desk between threads of one process: one book under the channel's lock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from specforge_core.contracts import CaptureBatch, ChannelError, Lease, LeaseDesk
from specforge_core.features.lease_book import LeaseBook


class MemoryLeases(LeaseDesk):
    """What every caller of ``leases()`` gets: the same desk.

    :param changed: notified whenever a writer of the channel ends.
    :param lives: whether the writer of a name is open; called with ``changed`` held.
    """

    def __init__(self, changed: threading.Condition, *, lives: Callable[[str], bool]) -> None:
        self._changed = changed
        self._lives = lives
        self._book = LeaseBook()

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        with self._changed:
            for batch in batches:
                self._book.offer(batch)
            self._changed.notify_all()

    def take(self, holder: str, timeout: float) -> Lease | None:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                if not self._lives(holder):
                    raise ChannelError("only an open writer can hold a lease", where=f"writer {holder}")
                self._drop_the_gone()
                lease = self._book.take(holder)
                remaining = deadline - time.monotonic()
                if lease is not None or self._book.ended is not None or remaining <= 0:
                    return lease
                self._changed.wait(remaining)

    def _drop_the_gone(self) -> None:
        for holder in self._book.holders:
            if not self._lives(holder):
                self._book.drop(holder)

    def finish(self, lease: Lease) -> None:
        with self._changed:
            self._book.finish(lease)

    def give_back(self, lease: Lease) -> None:
        with self._changed:
            self._book.give_back(lease)
            self._changed.notify_all()

    def outstanding(self) -> list[CaptureBatch]:
        with self._changed:
            return self._book.outstanding()

    def end(self, reason: str) -> None:
        with self._changed:
            self._book.end(reason)
            self._changed.notify_all()

    @property
    def ended(self) -> str | None:
        with self._changed:
            return self._book.ended

    def close(self) -> None:
        """Nothing to give back: the desk is the channel's."""
