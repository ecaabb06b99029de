# SPDX-License-Identifier: Apache-2.0
"""Removals that the master could not be asked for yet.

Whoever frees a window of samples must not wait for a dead master once per sample. So removals are done at once while
the master answers, and kept while it does not; the store's next call tries them again. They are kept in bounded number:
a master that is away for long has usually lost everything anyway.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from specforge_mooncake_store.connection import Connection, Unreachable

_MOST = 20_000

_log = logging.getLogger(__name__)

Removal = Callable[[], None]
"""Removes what it is about, or raises Unreachable; done twice it does no harm."""


class Removals:
    """What one process still has to remove, in order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Removal] = deque()
        self._working = threading.Lock()

    def add(self, removal: Removal) -> None:
        """Do it with the next ``work``. Beyond the bound the oldest is given up, with a warning."""
        self._waiting.append(removal)
        if len(self._waiting) > _MOST:
            self._waiting.popleft()
            _log.warning("the mooncake master is away for so long that features which were deleted may be left there")

    def work(self) -> None:
        """Do what waits while the master answers. A removal takes its sample's lock, so the caller must hold none."""
        with self._working:
            while self._waiting and self._connection.healthy:
                removal = self._waiting.popleft()
                try:
                    removal()
                except Unreachable:
                    self._waiting.appendleft(removal)
                    return
