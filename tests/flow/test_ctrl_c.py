# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C writes a checkpoint and leaves; the same command goes on from it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from command_line import make_run_file, start
from specforge_core.checkpoint.resume import find_latest
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(300)

DEADLINE_SECONDS = 120


@pytest.mark.parametrize("topology", ["offline", "colocated"])
def test_ctrl_c_checkpoints_and_the_same_command_goes_on(topology: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    run_file = make_run_file(
        tiny_model, tmp_path / "run.yaml", topology=topology, training={"epochs": 60}, checkpoint={"every_steps": 1000}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start("run", str(run_file), cwd=tmp_path)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not metrics.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "goes on from there" in err
    latest = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    stopped_at = int(latest.name.removeprefix("step-"))
    assert 0 < stopped_at < 180

    process = start("run", str(run_file), "training.max_steps=180", cwd=tmp_path)
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 2, "max_steps was not part of the first run"
    assert "training.max_steps" in err

    process = start("run", str(run_file), cwd=tmp_path)
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 181))
