# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a CUDA device, as processes: captured, trained, killed and resumed, exported, decoded."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Specforge, make_run_file, start
from tiny_model import TinyModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(500),
]

BLOCKS = {"block_size": 4, "num_anchors": 8, "num_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
STRATEGIES: dict[str, dict[str, Any]] = {
    "eagle3": {"name": "eagle3", "ttt_steps": 3, "draft_vocab_size": 128},
    "dflash": {"name": "dflash", **BLOCKS, "sliding_window": 8},
    "domino": {"name": "domino", **BLOCKS, "emb_dim": 8, "gru_hidden_dim": 16},
}


def write_run(model: TinyModel, path: Path, name: str, *, device: str, dtype: str = "float32", epochs: int = 2) -> Path:
    import yaml

    run_file = make_run_file(
        model,
        path,
        target={"device": device},
        training={"device": device, "dtype": dtype, "epochs": epochs},
    )
    run_file.write_text(yaml.safe_dump(yaml.safe_load(run_file.read_text()) | {"strategy": STRATEGIES[name]}))
    return run_file


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_trains_exports_and_decodes_losslessly(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    run_file = write_run(tiny_model, tmp_path / "run.yaml", name, device="cuda")
    done = specforge("run", str(run_file), "topology=colocated")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 6
    exported = specforge("export", str(tmp_path / "run"))
    assert exported.returncode == 0, exported.stderr
    benched = specforge("bench", str(tmp_path / "run"), "--draft", exported.stdout.strip(), "--json")
    assert benched.returncode == 0, benched.stderr
    assert json.loads(benched.stdout)["lossless"] is True


@pytest.mark.parametrize("name", STRATEGIES)
def test_bf16_follows_the_curve_of_fp32_on_cpu(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    curves = []
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        path = tmp_path / f"{device}-{dtype}.yaml"
        run_file = write_run(tiny_model, path, name, device=device, dtype=dtype, epochs=20)
        done = specforge("run", str(run_file), "training.learning_rate=0.003", "checkpoint.every_steps=1000")
        assert done.returncode == 0, done.stderr
        curves.append(torch.tensor(losses(run_file.with_suffix(""))))
    cpu, fp32, bf16 = curves
    assert cpu[-3:].mean() < cpu[:3].mean(), "three windows are an epoch; nothing was learned"
    assert ((fp32 - cpu) / cpu).abs().max() < 0.01
    assert ((bf16 - cpu) / cpu).abs().mean() < 0.02


def test_killed_and_resumed_it_ends_where_the_undisturbed_run_ends(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path
) -> None:
    whole = write_run(tiny_model, tmp_path / "whole.yaml", "eagle3", device="cuda", epochs=40)
    done = specforge("run", str(whole))
    assert done.returncode == 0, done.stderr
    killed = write_run(tiny_model, tmp_path / "killed.yaml", "eagle3", device="cuda", epochs=40)
    process = start("run", str(killed), cwd=tmp_path)
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = specforge("run", str(killed))
    assert done.returncode == 0, done.stderr
    expected, found = (torch.tensor(losses(tmp_path / name)) for name in ("whole", "killed"))
    assert found.shape == expected.shape
    # Atomic additions of a GPU differ in their last bits from run to run.
    assert ((found - expected) / expected).abs().max() < 1e-3
