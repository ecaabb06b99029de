# SPDX-License-Identifier: Apache-2.0
"""Memory registered with the transfer engine for the time of a transfer, as RDMA needs it.

The engine refuses ranges that overlap what is registered already, and forgets a range at the first unregistering. So
what overlaps within one transfer is registered as one range, and what several threads transfer at once is counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from specforge_core.contracts import StoreError

Range = tuple[int, int]
"""Address and bytes."""


class Registrations:
    """What one client has registered."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._counts: Counter[Range] = Counter()

    @contextmanager
    def hold(self, ranges: Sequence[Range]) -> Iterator[None]:
        """Keep memory registered inside the block.

        :raises StoreError: the engine refuses it: it overlaps other memory that is being transferred.
        """
        held: list[Range] = []
        try:
            for merged in merge(ranges):
                self._acquire(merged)
                held.append(merged)
            yield
        finally:
            for merged in held:
                self._release(merged)

    def _acquire(self, merged: Range) -> None:
        with self._lock:
            if not self._counts[merged] and self._client.register_buffer(*merged) != 0:
                raise StoreError(
                    f"{merged[1]} bytes of tensor memory cannot be registered for transfer",
                    where="store mooncake",
                    hint="check `ulimit -l`; do not transfer overlapping tensors from several threads at once",
                )
            self._counts[merged] += 1

    def _release(self, merged: Range) -> None:
        with self._lock:
            self._counts[merged] -= 1
            if not self._counts[merged]:
                del self._counts[merged]
                self._client.unregister_buffer(merged[0])


def merge(ranges: Sequence[Range]) -> list[Range]:
    """Disjoint ranges, sorted, that cover the given ones exactly."""
    merged: list[Range] = []
    for address, nbytes in sorted(ranges):
        if merged and address < sum(merged[-1]):
            begin, held = merged[-1]
            merged[-1] = (begin, max(held, address + nbytes - begin))
        else:
            merged.append((address, nbytes))
    return merged
