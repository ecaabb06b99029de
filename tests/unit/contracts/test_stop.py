# SPDX-License-Identifier: Apache-2.0
"""The stop signal, also from a signal handler that interrupts a wait of the same thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from specforge_core.contracts import RunStopped, StopSignal

# Interrupted as often as it can be, the main thread is sooner or later caught inside the wait's own bookkeeping.
STORM = """
import os, signal, threading, time
from specforge_core.contracts import StopSignal
current = StopSignal()
signal.signal(signal.SIGALRM, lambda number, frame: current.request("alarm"))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
until = time.monotonic() + 3
while time.monotonic() < until:
    current = StopSignal()
    current.wait(0.001)
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_a_wait_survives_a_storm_of_signals() -> None:
    assert subprocess.run([sys.executable, "-c", STORM], timeout=30, check=False).returncode == 0


def test_the_first_reason_stays_and_is_raised() -> None:
    stop = StopSignal()
    stop.raise_if_requested()
    stop.request("Ctrl-C")
    stop.request("another")
    assert stop.reason == "Ctrl-C"
    with pytest.raises(RunStopped, match="Ctrl-C"):
        stop.raise_if_requested()


def test_a_wait_ends_with_the_request_or_its_time() -> None:
    stop = StopSignal()
    began = time.monotonic()
    assert not stop.wait(0.1)
    assert time.monotonic() - began >= 0.1
    threading.Timer(0.1, stop.request, ["enough"]).start()
    assert stop.wait(20.0)
    assert time.monotonic() - began < 10.0
