# SPDX-License-Identifier: Apache-2.0
"""A run killed with SIGKILL at random points and started again ends with the weights of one never interrupted."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest
from command_line import make_run_file, start
from specforge_core.checkpoint.resume import find_latest
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(600)

DEADLINE_SECONDS = 120
KILLS = 3


def final_weights(run: Path) -> str:
    """A digest of every tensor of the last checkpoint: draft and optimizer."""
    latest = find_latest(run / "checkpoints")
    assert latest is not None
    assert latest.name == "step-00000012"
    digest = hashlib.sha256()
    for path in sorted((latest / "tensors").rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_to_the_end(run_file: Path, cwd: Path) -> None:
    process = start("run", str(run_file), cwd=cwd)
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err


def kill_during(run_file: Path, cwd: Path, *, after_lines: int, delay: float) -> None:
    """Start the run and kill it ``delay`` seconds after metrics.jsonl has so many lines (or after it ended)."""
    metrics = cwd / run_file.stem / "metrics.jsonl"
    process = start("run", str(run_file), cwd=cwd)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= after_lines:
            time.sleep(delay)
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE_SECONDS)


@pytest.mark.parametrize("topology", ["offline", "colocated"])
def test_killed_run_ends_with_the_same_bits(topology: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    settings = {"topology": topology, "training": {"epochs": 4}, "checkpoint": {"every_steps": 1}}
    whole = make_run_file(tiny_model, tmp_path / "whole.yaml", **settings)
    run_to_the_end(whole, tmp_path)

    killed = make_run_file(tiny_model, tmp_path / "killed.yaml", **settings)
    chance = random.Random(topology)
    for after_lines in sorted(chance.sample(range(1, 11), KILLS)):
        kill_during(killed, tmp_path, after_lines=after_lines, delay=chance.uniform(0.0, 0.05))
    run_to_the_end(killed, tmp_path)

    assert final_weights(tmp_path / "killed") == final_weights(tmp_path / "whole")
