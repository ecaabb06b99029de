# SPDX-License-Identifier: Apache-2.0
"""A training process that is really killed, at random moments, ends with the same bits once it is started again."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from specforge_core.checkpoint.layout import complete_checkpoints
from toy_run import ToyRun, same_bits

_SUPPORT = Path(__file__).parents[1] / "support"
_EPOCHS, _STEPS = 10, 40
_DEADLINE_SECONDS = 60.0


def _start(directory: Path) -> subprocess.Popen[bytes]:
    # a checkpoint at every step: much of the time the process is killed while one is being written
    return subprocess.Popen([sys.executable, "toy_run.py", str(directory), str(_EPOCHS), "1"], cwd=_SUPPORT)


def _kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool], seconds_later: float = 0.0) -> None:
    end = time.monotonic() + _DEADLINE_SECONDS
    while not reached() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(seconds_later)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)


def _steps_logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = ToyRun(directory=tmp_path / "whole", epochs=_EPOCHS, checkpoint_every=1).weights()
    directory = tmp_path / "killed"
    generator = random.Random()
    seed = generator.randrange(1 << 30)
    generator.seed(seed)
    for target in sorted(generator.sample(range(2, _STEPS - 6), 3)):
        process = _start(directory)
        _kill_when(process, lambda: _steps_logged(directory) >= target, generator.random() * 0.02)  # noqa: B023
        assert process.returncode == -signal.SIGKILL, f"seed {seed}"
    process = _start(directory)  # and once while a checkpoint is surely being written
    _kill_when(process, lambda: any(directory.glob("checkpoints/.partial-*/tensors")))
    assert complete_checkpoints(directory / "checkpoints"), f"seed {seed}"

    resumed = ToyRun(directory=directory, epochs=_EPOCHS, checkpoint_every=1).weights()
    assert same_bits(whole, resumed), f"seed {seed}"
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, _STEPS + 1)), f"seed {seed}"
    assert not list(directory.glob("checkpoints/.partial-*")), "what the killed writers left is cleared"


def test_an_interrupted_process_checkpoints_where_it_stands(tmp_path: Path) -> None:
    """Ctrl-C as the command line wires it: the signal requests a stop, the window is finished and kept."""
    program = (
        "import sys, signal; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from toy_run import ToyRun\n"
        "run = ToyRun(directory=Path(sys.argv[1]), epochs=3000, checkpoint_every=100000)\n"
        "signal.signal(signal.SIGINT, lambda *_: run.stop.request('interrupted'))\n"
        "print(run.trainer().fit())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=_SUPPORT, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + _DEADLINE_SECONDS
    while _steps_logged(tmp_path) < 5 and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (0, "stopped")
    last = complete_checkpoints(tmp_path / "checkpoints")[-1]
    assert last.name == f"step-{_steps_logged(tmp_path):08d}"
