# SPDX-License-Identifier: Apache-2.0
"""Whoever stands still ends; whoever was only stopped for a while goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

PROGRAM = """
import sys, time
from specforge_core.run.watchdog import ending_when_stuck
began = time.monotonic()
moves = sys.argv[1] == "moves"
moved = lambda: began if not moves else last[0]
last = [began]
with ending_when_stuck(lambda: time.monotonic() - moved(), limit_seconds=1.0):
    print("working", flush=True)
    for _ in range(30):
        time.sleep(0.1)
        last[0] = time.monotonic()
print("done", flush=True)
"""


def start(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


def test_a_process_that_stands_still_is_killed() -> None:
    assert start("stands still").wait(20) == -signal.SIGKILL


def test_a_process_that_was_stopped_longer_than_the_limit_goes_on() -> None:
    process = start("moves")
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "done\n")
