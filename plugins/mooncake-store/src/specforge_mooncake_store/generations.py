# SPDX-License-Identifier: Apache-2.0
"""Generations that two processes never share, drawn without asking anybody.

A process that was taken for dead may still be putting a sample that its replacement captures again. If both drew the
same generation their keys would be the same, and the service answers a put of a key that another is writing with
success while it stores nothing. So a generation is the time, with random low bits; and never below one that this
process, or the sample's index, has seen, unless no clock can have made that one. Across ``delete`` on *another*
machine it grows as far as the clocks agree.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

from specforge_mooncake_store.layout import MAX_GENERATION

_EPOCH_SECONDS = 1_735_689_600  # 2025-01-01: milliseconds since then, and the random bits, fit into 53 bits until 2029
_RANDOM_BITS = 16
_BELIEVED = MAX_GENERATION // 2
"""The highest that pushes others above it: a clock gets there in a thousand years, whoever writes an index at once."""


class Generations:
    """Draws generations for one process. Safe to use from several threads."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._newest = 0
        self._lock = threading.Lock()

    def draw(self, above: int = 0) -> int:
        """A generation higher than ``above`` and than every one drawn or seen here, also after a clock jumped back."""
        moment = max(int((self._now() - _EPOCH_SECONDS) * 1000), 0)
        with self._lock:
            floor = max(self._newest, above if above <= _BELIEVED else 0)
            moment = max(moment, (floor >> _RANDOM_BITS) + 1)
            self._newest = moment << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
            return self._newest

    def saw(self, generation: int) -> None:
        """What is drawn from now on is higher than ``generation``."""
        with self._lock:
            self._newest = max(self._newest, generation if generation <= _BELIEVED else 0)
