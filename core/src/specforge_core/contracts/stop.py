# SPDX-License-Identifier: Apache-2.0
"""One signal that both halves of a run in one process watch: Ctrl-C, or the failure of either half."""

from __future__ import annotations

import time

from specforge_core.contracts.errors import RunStopped

_TICK_SECONDS = 0.02
"""How late a waiting thread may learn of a stop; nobody notices two hundredths of a second."""


class StopSignal:
    """Requested once, with a reason; every wait of the run ends soon after. Any thread may use it, or a signal handler.

    It holds no lock: a handler runs in the middle of whatever its thread was doing, which might be holding it.
    """

    def __init__(self) -> None:
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the run is asked to stop, or None while it is not."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask the run to stop. The first reason stays."""
        if self._reason is None:
            self._reason = reason

    def wait(self, seconds: float) -> bool:
        """Sleep up to ``seconds``; True as soon as a stop is requested."""
        until = time.monotonic() + seconds
        while self._reason is None and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, _TICK_SECONDS))
        return self._reason is not None

    def raise_if_requested(self) -> None:
        """:raises RunStopped: a stop was requested."""
        if self._reason is not None:
            raise RunStopped(f"stopped: {self._reason}")
