# SPDX-License-Identifier: Apache-2.0
"""Whether the process that keeps a record file open lives: how it shows that, and how others tell.

Every writer and reader of a file channel keeps its file locked and touches it now and then. Whoever sees the lock
knows at once that the process ended; whoever does not, on another machine perhaps, by the heartbeat that stopped.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress

from specforge_core.features.record_file import OwnerView, RecordAppender

_BEATS_PER_TIMEOUT = 4


class Liveness:
    """Whether a file's owner lives, from what can be observed of the file. Pure: it is told the time.

    Where locks are seen, a free lock means that the owner ended, whatever ended it: where both run on one kernel, or
    where the lock was seen held before. Elsewhere a heartbeat that stood still for too long does.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._seen_locked = False
        self._heartbeat_ns = -1
        self._moved_at = 0.0

    def is_dead(self, *, locked: bool, locks_seen: bool, heartbeat_ns: int, now: float) -> bool:
        if locked or heartbeat_ns != self._heartbeat_ns:
            self._heartbeat_ns = heartbeat_ns
            self._moved_at = now
        if locked:
            self._seen_locked = True
            return False
        return locks_seen or self._seen_locked or now - self._moved_at > self._timeout


class OwnerWatch:
    """Liveness of one file's owner, looked at now and then."""

    def __init__(self, owner: OwnerView, *, timeout_seconds: float) -> None:
        self.owner = owner
        self._liveness = Liveness(timeout_seconds)

    def is_dead(self, *, domain: str) -> bool:
        """:param domain: the lock domain that the owner found itself in."""
        return self._liveness.is_dead(
            locked=self.owner.is_locked(),
            locks_seen=self.owner.sees_locks_of(domain),
            heartbeat_ns=self.owner.heartbeat_ns(),
            now=time.monotonic(),
        )


class Heartbeat:
    """Touches a file until it is stopped, or until whoever keeps the file is dropped without closing it."""

    def __init__(self, file: RecordAppender, *, timeout_seconds: float) -> None:
        self._stop = threading.Event()
        arguments = (weakref.ref(file), self._stop, timeout_seconds / _BEATS_PER_TIMEOUT)
        threading.Thread(target=_beat, args=arguments, daemon=True).start()
        weakref.finalize(file, self._stop.set)

    def stop(self) -> None:
        self._stop.set()


def _beat(held: weakref.ref[RecordAppender], stop: threading.Event, seconds: float) -> None:
    while not stop.wait(seconds):
        file = held()
        with suppress(OSError, ValueError):  # it was closed meanwhile
            if file is not None:
                file.beat()
        del file
