# SPDX-License-Identifier: Apache-2.0
"""How long a capture process waits for a lease, and what it says while it does and when it does not any more."""

from __future__ import annotations

import time

from specforge_core.contracts import DeadlineExceeded, InFlight, PeerDied, RefWriter


class Quiet:
    """How long nothing has moved while this process waits for a lease."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: InFlight | None = None
        self._died: PeerDied | None = None
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()

    def describe(self, writer: RefWriter) -> str:
        """What is being waited for.

        :raises ChannelFailed: training failed.
        :raises DeadlineExceeded: it has been waited for too long.
        """
        try:
            seen, self._died = writer.in_flight(), None
        except PeerDied as error:  # it may be started again
            seen, self._died = None, error
        if seen != self._seen:
            self._seen = seen
            self.renew()
        waited = time.monotonic() - self._since
        if waited > self._seconds:
            raise DeadlineExceeded(
                f"nobody wanted anything captured for {waited:.0f} s"
                + (f": {self._died.message}" if self._died else ""),
                where="capture",
                hint="see what the train role is doing; loading.deadline_seconds is how long it may take",
            )
        if seen is None:
            return "the train role to be started again"
        return f"training to want more: {seen.refs} samples in flight, {seen.nbytes / 2**20:.1f} MiB"
