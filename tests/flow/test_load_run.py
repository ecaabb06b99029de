# SPDX-License-Identifier: Apache-2.0
"""The load run, small: several capture processes, backpressure on, every sample read back and compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

LOAD_RUN = Path(__file__).parents[2] / "benchmarks" / "load_run.py"


def test_many_capture_processes_keep_below_the_watermark(tmp_path: Path) -> None:
    options = ["--samples", "600", "--captures", "3", "--directory", str(tmp_path), "--ignore-memory"]
    done = subprocess.run(
        [sys.executable, str(LOAD_RUN), *options, "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["most_bytes"] <= result["high_watermark_bytes"]
    assert result["most_refs"] <= 12 * 16
    assert result["left"] == 0
    assert not re.search("Traceback", done.stderr)
