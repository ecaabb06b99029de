# SPDX-License-Identifier: Apache-2.0
"""The heartbeat of everybody who lives in this process: one thread and one connection for all of them."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress

from specforge_core.contracts import SpecForgeError

from specforge_redis_channel.connection import REFS, RedisConnection, plain

_BEATS_PER_LEASE = 4
Member = tuple[str, str, str]
"""Kind (``w`` or ``r``), name and session."""


class Heart:
    """Shows the server which writers and readers live here; runs from the first that joins to the last that leaves."""

    def __init__(self, connection: RedisConnection, *, lease_seconds: float) -> None:
        self._connection = connection
        self._seconds = lease_seconds / _BEATS_PER_LEASE
        self._lock = threading.Lock()
        self._calling = threading.Lock()
        self._members: set[Member] = set()
        self._stop = threading.Event()

    def join(self, owner: object, member: Member) -> None:
        """Beat for ``member`` until it leaves, or ``owner`` is gone."""
        weakref.finalize(owner, self.leave, member).atexit = False
        with self._lock:
            if not self._members:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), daemon=True, name="redis-heartbeat").start()
            self._members.add(member)

    def leave(self, member: Member) -> None:
        with self._lock:
            self._members.discard(member)
            if not self._members:
                self._stop.set()

    def beat(self, *, at_most: float) -> None:
        """Beat once, now, trying for so many seconds.

        :raises ChannelError: the server is not there.
        """
        with self._calling:
            with self._lock:
                words = [plain(word) for member in sorted(self._members) for word in member]
            if words:
                self._connection.call(lambda: self._connection.run(REFS, "beat", *words), at_most=at_most)

    def _run(self, stop: threading.Event) -> None:
        pause = self._seconds
        while not stop.wait(pause):
            pause = self._seconds / _BEATS_PER_LEASE
            with suppress(SpecForgeError):  # a server that is away is told as soon as it is back
                self.beat(at_most=pause)
                pause = self._seconds
        with self._calling:
            if not self._members:
                self._connection.close()
