# SPDX-License-Identifier: Apache-2.0
"""Whether the process that keeps a record file open lives: how it shows that, and how others tell.

Every writer and reader of a file channel keeps its file locked and touches it now and then. Whoever sees the lock
knows at once that the process ended; whoever does not, on another machine perhaps, by the heartbeat that stopped. A
process that keeps its lock while its heartbeat stands still is stalled: it may go on, but nobody should wait for it.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress

from specforge_core.features.followed_file import OwnerView
from specforge_core.features.record_file import RecordAppender

_BEATS_PER_TIMEOUT = 4

_beating_devices: set[int] = set()
"""File systems on which heartbeats of this process were seen to move a file's time. On another one, where times may
stand still for everybody, nobody is taken for stalled."""


class Liveness:
    """Whether a file's owner lives, from what can be observed of the file. Pure: it is told the time.

    Where locks are seen, a free lock means that the owner ended, whatever ended it: where both run on one kernel, or
    where the lock was seen held before. Elsewhere a heartbeat that stood still for too long does.

    One that keeps its lock is stalled where its heartbeat was *seen* to stand still for too long: what passed between
    two looks counts for one beat at most, for a watcher that stood still itself, with the whole machine perhaps, has
    not seen anybody stand still.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._seen_locked = False
        self._heartbeat_ns = -1
        self._moved_at = self._looked_at = 0.0
        self._still_seconds = 0.0

    def is_dead(self, *, locked: bool, locks_seen: bool, heartbeat_ns: int, now: float) -> bool:
        since = min(now - self._looked_at, self._timeout / _BEATS_PER_TIMEOUT)
        still = heartbeat_ns == self._heartbeat_ns
        self._still_seconds = self._still_seconds + since if still else 0.0
        if locked or not still:
            self._moved_at = now
        self._heartbeat_ns, self._looked_at = heartbeat_ns, now
        self._seen_locked = self._seen_locked or locked
        return not locked and (locks_seen or self._seen_locked or now - self._moved_at > self._timeout)

    @property
    def is_stalled(self) -> bool:
        """Whether the heartbeat was seen to stand still for too long, whoever has the lock."""
        return self._still_seconds > self._timeout


class OwnerWatch:
    """Liveness of one file's owner, looked at now and then."""

    def __init__(self, owner: OwnerView, *, timeout_seconds: float) -> None:
        self.owner = owner
        self.was_locked = False
        """At the last look."""
        self._liveness = Liveness(timeout_seconds)

    def is_dead(self, *, domain: str) -> bool:
        """:param domain: the lock domain that the owner found itself in."""
        self.was_locked = self.owner.is_locked()
        return self._liveness.is_dead(
            locked=self.was_locked,
            locks_seen=self.owner.sees_locks_of(domain),
            heartbeat_ns=self.owner.heartbeat_ns(),
            now=time.monotonic(),
        )

    def is_stalled(self) -> bool:
        """Whether, as ``is_dead`` last saw it, its heartbeat stands still where those of this process go on."""
        return self._liveness.is_stalled and self.owner.device() in _beating_devices


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
            if file is not None and file.beat():
                _beating_devices.add(file.device())
        del file
