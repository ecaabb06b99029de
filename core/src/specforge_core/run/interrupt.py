# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first asks the run to checkpoint and leave, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from specforge_core.contracts import Progress, StopSignal

EXIT_INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""


class StoppableProgress:
    """A stage's progress that ends the stage when a stop is requested: for a stage that is told of none otherwise."""

    def __init__(self, progress: Progress, stop: StopSignal) -> None:
        self._progress = progress
        self._stop = stop

    def begin(self, description: str, total: int | None) -> None:
        """:raises RunStopped: a stop was requested."""
        self._stop.raise_if_requested()
        self._progress.begin(description, total)

    def advance(self, units: int, **values: float) -> None:
        """:raises RunStopped: a stop was requested."""
        self._stop.raise_if_requested()
        self._progress.advance(units, **values)

    def waiting(self, reason: str | None) -> None:
        """:raises RunStopped: a stop was requested."""
        self._stop.raise_if_requested()
        self._progress.waiting(reason)


@contextmanager
def stop_on_signal(stop: StopSignal) -> Iterator[None]:
    """While active, SIGINT and SIGTERM request a stop; call from the main thread."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.reason is not None:
            os._exit(EXIT_INTERRUPTED)
        stop.request(f"interrupted by {signal.Signals(number).name}")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
