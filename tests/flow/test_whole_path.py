# SPDX-License-Identifier: Apache-2.0
"""The whole path with real parts: capture, train, evaluate, export, bench and report, one command after another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_line import Specforge, make_run_file
from safetensors.torch import load_file
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(600)


def test_offline_run_from_prompts_to_report(specforge: Specforge, tiny_model: TinyModel, tmp_path: Path) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "offline.yaml")
    run = tmp_path / "offline"

    for command in ("capture", "train"):
        done = specforge(command, str(run_file))
        assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["training"]["learning_rate"] == 1e-4
    assert json.loads((run / "provenance.json").read_text())["plugins"]["strategy:eagle3"]["version"]

    evaluated = specforge("eval", str(run), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["simulated_acceptance_length"] >= 1.0

    exported = specforge("export", str(run))
    assert exported.returncode == 0, exported.stderr
    directory = Path(exported.stdout.strip())
    assert "midlayer.self_attn.q_proj.weight" in load_file(directory / "model.safetensors")

    benched = specforge("bench", str(run), "--draft", str(directory), "--json")
    assert benched.returncode == 0, benched.stderr
    result = json.loads(benched.stdout)
    assert result["lossless"] is True
    assert result["acceptance_length"] >= 1.0
    assert json.loads((run / "bench.json").read_text()) == result

    reported = specforge("report", str(run))
    assert reported.returncode == 0, reported.stderr
    page = Path(reported.stdout.strip()).read_text()
    assert "http" not in page.split("<body")[0]


def test_colocated_run_keeps_features_in_memory(specforge: Specforge, tiny_model: TinyModel, tmp_path: Path) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "colocated.yaml", topology="colocated")
    done = specforge("run", str(run_file))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "colocated" / "features" / "train" / "store").exists()
    assert len((tmp_path / "colocated" / "metrics.jsonl").read_text().splitlines()) == 6

    again = specforge("run", str(run_file))
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "colocated" / "metrics.jsonl").read_text().splitlines()) == 6


def test_interrupted_capture_goes_on_where_it_stopped(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path
) -> None:
    whole = make_run_file(tiny_model, tmp_path / "whole.yaml")
    first = specforge("capture", str(whole))
    assert first.returncode == 0, first.stderr
    assert "captured 30 samples" in first.stderr
    again = specforge("capture", str(whole))
    assert again.returncode == 0, again.stderr
    assert "captured 0 samples" in again.stderr


def test_a_run_of_other_settings_is_refused_and_lists_them(
    specforge: Specforge, tiny_model: TinyModel, tmp_path: Path
) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "first.yaml")
    assert specforge("run", str(run_file)).returncode == 0
    before = (tmp_path / "first" / "config.yaml").read_text()
    other = specforge("train", str(run_file), "training.learning_rate=0.5", "strategy.ttt_steps=2")
    assert other.returncode == 2
    assert "training.learning_rate" in other.stderr
    assert "strategy.ttt_steps" in other.stderr
    assert (tmp_path / "first" / "config.yaml").read_text() == before
    smaller = specforge("train", str(run_file), "training.micro_batch_size=2")
    assert smaller.returncode == 0, smaller.stderr
