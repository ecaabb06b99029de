# SPDX-License-Identifier: Apache-2.0
"""A preparation that is killed at any moment goes on where it was, gives the same set, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preparing import contents, mixed_rows, prepare, talk, write_rows
from specforge_core.contracts import SilentProgress
from specforge_core.prompts.prompt_set import PromptSet

SCRIPT = Path(__file__).parents[1] / "prepare_until_killed.py"
DEADLINE_SECONDS = 60
SLOW = [talk("TAKE-YOUR-TIME"), *mixed_rows(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", [*SLOW, *SLOW, *SLOW, *SLOW, *SLOW, *SLOW])


def start(source: Path, directory: Path, workers: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(source), str(directory), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def run_to_an_end(process: subprocess.Popen[str], *, kill_after: float | None) -> tuple[bool, int]:
    """Whether it was done, and how many rows it found done when it began."""
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "begin\n"
        found = int(process.stdout.readline().removeprefix("done "))
        if kill_after is not None:
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait(DEADLINE_SECONDS)
    return process.returncode == 0, found


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_at_random_moments(tmp_path: Path, source: Path, workers: int) -> None:
    whole = contents(prepare([source], tmp_path / "whole"))
    generator = random.Random(workers)
    found = [0]
    for _ in range(20):
        done, rows = run_to_an_end(start(source, tmp_path / "set", workers), kill_after=generator.uniform(0, 0.12))
        assert rows >= found[-1], "what was saved is kept"
        found.append(rows)
        if done:
            break
    if not done:
        assert run_to_an_end(start(source, tmp_path / "set", workers), kill_after=None)[0]
    assert found[-1] > 0, "something was saved before a kill"
    assert contents(PromptSet.open(tmp_path / "set")) == whole
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.jsonl", "whole", ".whole.lock", "set", ".set.lock"}


def kill_half_way(source: Path, directory: Path) -> Path:
    """A partial set."""
    process = start(source, directory)
    partial = directory.parent / f".{directory.name}.partial"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (partial / "progress.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return partial


class FirstAdvance(SilentProgress):
    """How many rows were done before."""

    rows = -1

    def advance(self, units: int, **values: float) -> None:
        if self.rows < 0:
            self.rows = units


@pytest.mark.parametrize("name", ["progress.json", "set/input_ids.i32", "places.i64", "set/rejects.jsonl"])
@pytest.mark.parametrize("change", ["a bit", "cut", "gone", "longer"])
def test_what_was_saved_and_then_damaged_is_not_gone_on_with(tmp_path, source, name: str, change: str) -> None:
    partial = kill_half_way(source, tmp_path / "set")
    content = (partial / name).read_bytes()
    (partial / name).unlink()
    middle = len(content) // 3
    if change != "gone":
        bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (partial / name).write_bytes({"a bit": bit, "cut": content[:middle], "longer": content + b"torn"}[change])
    progress = FirstAdvance()
    again = prepare([source], tmp_path / "set", progress=progress)
    assert contents(again) == contents(prepare([source], tmp_path / "whole"))
    if change == "longer" and name != "progress.json":
        assert progress.rows > 0, "what was torn is cut off"
    elif change != "longer":
        assert progress.rows == 0
    assert not partial.exists()


def test_other_settings_begin_anew(tmp_path: Path, source: Path) -> None:
    partial = kill_half_way(source, tmp_path / "set")
    progress = FirstAdvance()
    prompts = prepare([source], tmp_path / "set", progress=progress, max_length=50)
    assert progress.rows == 0
    assert max(prompt.num_tokens for prompt in prompts) == 50
    assert not partial.exists()


def test_workers_end_with_the_process_that_reads(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [talk("TAKE-YOUR-TIME")] * 2000)
    process = start(source, tmp_path / "set", workers=2)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(workers := children_of(process.pid)) < 2:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
