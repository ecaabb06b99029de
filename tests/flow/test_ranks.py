# SPDX-License-Identifier: Apache-2.0
"""Two ranks that torchrun starts train what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Specforge, make_run_file
from safetensors.torch import load_file
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(300)

DEADLINE_SECONDS = 200


def exported(specforge: Specforge, run: Path) -> dict[str, torch.Tensor]:
    ended = specforge("export", str(run))
    assert ended.returncode == 0, ended.stderr
    return load_file(Path(ended.stdout.strip()) / "model.safetensors")


def test_two_ranks_equal_one_process(specforge: Specforge, tiny_model: TinyModel, tmp_path: Path) -> None:
    alone = make_run_file(tiny_model, tmp_path / "alone.yaml")
    assert specforge("run", str(alone)).returncode == 0

    features = str(tmp_path / "alone" / "features")
    ranked = make_run_file(tiny_model, tmp_path / "ranked.yaml", data={"features": features})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*torchrun, "-m", "specforge_core.cli.main", "train", str(ranked)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "ranked" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]

    one, two = exported(specforge, tmp_path / "alone"), exported(specforge, tmp_path / "ranked")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6, msg=name)
