# SPDX-License-Identifier: Apache-2.0
"""A process killed in the middle of a put, a delete or an opening, at any line, leaves nothing and breaks nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "kill_at_every_line.py"
DEADLINE_SECONDS = 120
MEMORY = Path("/dev/shm")  # where syncing costs nothing


@pytest.mark.parametrize(("action", "at_least"), [("put", 80), ("delete", 40), ("open", 40)])
def test_sigkill_at_every_line(action: str, at_least: int) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        command = [sys.executable, str(SCRIPT), f"{directory}/store", action]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["deaths"] >= at_least
