# SPDX-License-Identifier: Apache-2.0
"""Ends a capture process that stands still with a batch in its hands: a device, a server or a mount that never answers.

Its heartbeat goes on in a thread of its own, so the others take it for alive and leave the batch to it, until the run
gives up. Such a call cannot be interrupted from within; the kernel ends the process, its locks go, and the batch comes
back to those that work. A process that is stopped shows no heartbeat and is passed over without this.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

_CHECKS = 20
"""Per limit. All of them must have found the same standstill: a process that was stopped itself, and goes on, finds one
long pause and has not looked so often."""


@contextmanager
def ending_when_stuck(stuck_seconds: Callable[[], float], *, limit_seconds: float) -> Iterator[None]:
    """Inside the block, end this process at once when ``stuck_seconds()`` goes beyond ``limit_seconds``."""
    done = threading.Event()
    pause = limit_seconds / _CHECKS

    def watch() -> None:
        checks, before = 0, 0.0
        while not done.wait(pause):
            stuck = stuck_seconds()
            checks, before = (checks + 1, stuck) if stuck > before else (0, stuck)
            if stuck > limit_seconds and checks >= _CHECKS:
                _log.critical(
                    "nothing moved for %.0f s while a batch was captured (a device, server or mount that does not "
                    "answer?): this process ends, so that others take the batch over. If a batch may take longer, "
                    "raise loading.deadline_seconds, of which this is half",
                    limit_seconds,
                )
                os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()
