# SPDX-License-Identifier: Apache-2.0
"""How long a wait for samples still lasts, and what it says when it does not."""

from __future__ import annotations

import time

from specforge_core.contracts import DeadlineExceeded, PeerDied

_HEAL_SECONDS = 2.0


class Patience:
    """One wait: how long it still lasts, and what to say when it does not."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._death: PeerDied | None = None
        self.renew()
        self._healed = time.monotonic()

    def renew(self) -> None:
        self._until = time.monotonic() + self._seconds

    @property
    def waited(self) -> float:
        """Seconds since something last came."""
        return self._seconds - (self._until - time.monotonic())

    @property
    def ended(self) -> bool:
        return time.monotonic() > self._until

    def heals(self) -> bool:
        """Whether it is time to look for what got lost."""
        now = time.monotonic()
        if now - self._healed < _HEAL_SECONDS:
            return False
        self._healed = now
        return True

    def died(self, error: PeerDied) -> None:
        self._death = error

    def error(self, arrived: str, *, sample: str) -> DeadlineExceeded:
        why = "" if self._death is None else f"; no capture process is alive: {self._death.message}"
        return DeadlineExceeded(
            f"not captured within {self._seconds:g} s; arrived so far: {arrived}{why}",
            where=f"sample {sample}",
            hint="start `specforge capture` with this run file, or see what the capture half is doing; "
            "loading.deadline_seconds is how long it may take",
        )
