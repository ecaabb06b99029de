# SPDX-License-Identifier: Apache-2.0
"""What this process put and is still there: what ``usage`` answers.

The service can list nothing, and who deletes is usually another process than who put. So every process remembers its
own samples, and asks now and then which of them still exist; its memory stays proportional to what is resident.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import islice

from specforge_core.contracts import SampleRef, Usage

from specforge_mooncake_store.connection import Connection, Unreachable

_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class _Held:
    generation: int
    nbytes: int
    key: str


class Holdings:
    """One process's samples. Safe to use from several threads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._look_at = _AT_ONCE

    def add(self, ref: SampleRef, key: str) -> None:
        """:param key: an object that exists as long as the sample does."""
        with self._lock:
            self._held[ref.sample_id] = _Held(ref.generation, ref.nbytes, key)
            grown = len(self._held) >= self._look_at
        if grown:
            self._look()
            self._look_at = max(_AT_ONCE, 2 * len(self._held))

    def drop(self, ref: SampleRef) -> None:
        """It is deleted; does nothing where another generation, or another process's, is meant."""
        with self._lock:
            held = self._held.get(ref.sample_id)
            if held is not None and held.generation == ref.generation:
                del self._held[ref.sample_id]

    def count(self) -> Usage:
        """What exists now; while the master does not answer, what existed when it last did."""
        self._look()
        with self._lock:
            return Usage(len(self._held), sum(held.nbytes for held in self._held.values()))

    def _look(self) -> None:
        with self._lock:
            remembered = iter(list(self._held.items()))
        while some := list(islice(remembered, _AT_ONCE)):
            try:
                there = self._connection.exist([held.key for _, held in some])
            except Unreachable:
                return
            self._forget([item for item, exists in zip(some, there, strict=True) if not exists])

    def _forget(self, gone: list[tuple[str, _Held]]) -> None:
        """Drop what is gone, where it was not put again meanwhile."""
        with self._lock:
            for sample_id, held in gone:
                if self._held.get(sample_id) is held:
                    del self._held[sample_id]
