# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first asks the run to checkpoint and leave, the second ends the process at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from specforge_core.contracts import StopSignal

EXIT_INTERRUPTED = 130


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
