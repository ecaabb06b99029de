# SPDX-License-Identifier: Apache-2.0
"""A prompt that the target cannot take: it fails, kills its process or hangs. The run goes on without it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import make_run_file
from fake_distributions import install
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(300)

POISONED = "train-00007"
ENGINE = """\
import os, signal, time
from specforge_core import TargetEngineSpec, hookimpl
from specforge_core.contracts import EngineCapabilities, TargetError
from specforge_hf_target.config import HfTargetConfig


class Config(HfTargetConfig):
    how: str = "raises"


def make(config):
    from specforge_hf_target.engine import HfTargetEngine

    class Engine(HfTargetEngine):
        def capture(self, prompts, request, epoch):
            if any(prompt.prompt_id == "POISONED" for prompt in prompts):
                if config.how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                while config.how == "hangs":  # a device that never answers; heartbeats go on
                    time.sleep(1)
                raise TargetError("this prompt is more than the target can take")
            return super().capture(prompts, request, epoch)

    return Engine(config)


@hookimpl
def specforge_target_engines():
    return [TargetEngineSpec(
        name="poisonable", config=Config, factory="poisonable_target:make",
        tokenizer="specforge_hf_target.tokenizer:load_tokenizer", capabilities=EngineCapabilities(),
    )]
"""


def run(tiny_model: TinyModel, directory: Path, *, topology: str, how: str) -> subprocess.CompletedProcess[str]:
    site = directory / "site"
    install(
        site,
        "poisonable-target",
        groups={"specforge.target_engines": {"poisonable": "poisonable_target"}},
        modules={"poisonable_target": ENGINE.replace("POISONED", POISONED)},
    )
    settings: dict[str, Any] = {
        "topology": topology,
        "target": {"name": "poisonable", "how": how},
        "training": {"epochs": 1},
        "capture": {"max_attempts": 1},
        "loading": {"deadline_seconds": 40.0 if how == "hangs" else 120.0},
    }
    run_file = make_run_file(tiny_model, directory / "poisoned.yaml", **settings)
    return subprocess.run(
        [sys.executable, "-m", "specforge_core.cli.main", "run", str(run_file)],
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def trained(run_directory: Path) -> list[tuple[int, str, int]]:
    with sqlite3.connect(run_directory / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT step, sample_id, generation FROM deals WHERE step >= 0 AND trained")
        return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("topology", "how"),
    [("offline", "raises"), ("colocated", "raises"), ("disaggregated", "dies"), ("disaggregated", "hangs")],
)
def test_a_poisoned_prompt_is_set_aside(topology: str, how: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    done = run(tiny_model, tmp_path, topology=topology, how=how)
    assert done.returncode == 0, done.stderr
    rows = trained(tmp_path / "poisoned")
    assert len(rows) == 24  # a member of its window, not a hole in it
    assert [sample for _, sample, generation in rows if generation == 0] == [f"{POISONED}.e0"]
    logs = "".join(path.read_text() for path in tmp_path.glob("poisoned/logs/*.log"))
    assert f"sample {POISONED}.e0 is set aside" in done.stderr + logs
    if how != "raises":
        assert "was killed by SIGKILL" in done.stderr
    if how == "hangs":
        assert "nothing moved for 20 s while a batch was captured" in logs
