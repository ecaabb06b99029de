# SPDX-License-Identifier: Apache-2.0
"""One signal that both halves of a run in one process watch: Ctrl-C, or the failure of either half."""

from __future__ import annotations

import threading

from specforge_core.contracts.errors import RunStopped


class StopSignal:
    """Requested once, with a reason; every wait of the run ends soon after. Thread-safe."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._reason: str | None = None

    @property
    def reason(self) -> str | None:
        """Why the run is asked to stop, or None while it is not."""
        return self._reason

    def request(self, reason: str) -> None:
        """Ask the run to stop. The first reason stays."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Sleep up to ``seconds``; True at once when a stop is requested."""
        return self._event.wait(seconds)

    def raise_if_requested(self) -> None:
        """:raises RunStopped: a stop was requested."""
        if self._event.is_set():
            raise RunStopped(f"stopped: {self._reason}")
