# SPDX-License-Identifier: Apache-2.0
"""Every EAGLE3 golden vector passes; what cannot be run says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from specforge_core.testing.golden import main

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("eagle3_*.safetensors")), ids=lambda p: p.stem)
def test_golden_vector(path, capsys):
    assert main([str(path)]) == 0, capsys.readouterr().out


def _copy(tmp_path, *, change=None, drop=None, metadata=None):
    with safe_open(GOLDEN / "eagle3_kl.safetensors", "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        header = stored.metadata()
    if change:
        tensors[change] = tensors[change] * 1.001
    if drop:
        del tensors[drop]
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, metadata={**header, **(metadata or {})})
    return path


@pytest.mark.parametrize("name", ["expected.loss", "grads.midlayer.self_attn.k_proj.weight", "weights.fc.weight"])
def test_a_changed_number_fails(tmp_path, name):
    assert main([str(_copy(tmp_path, change=name))]) == 1


@pytest.mark.parametrize("name", ["weights.fc.weight", "inputs.loss_mask", "frozen.lm_head.weight", "weights.t2d"])
def test_a_missing_tensor_is_named(tmp_path, capsys, name):
    assert main([str(_copy(tmp_path, drop=name))]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("not json", "golden"),
        ('{"strategy": "no-such", "draft_config": {}, "options": {}}', "no-such"),
        ('{"strategy": "eagle3", "draft_config": {}, "options": {}}', "draft_config lacks"),
        ('{"strategy": "eagle3", "draft_config": {}, "options": {"ttt_length": 7}}', "ttt_length"),
    ],
)
def test_a_header_that_cannot_be_used_is_explained(tmp_path, capsys, header, words):
    assert main([str(_copy(tmp_path, metadata={"golden": header}))]) == 2
    assert words in capsys.readouterr().err


def test_an_unreadable_file_is_an_error(tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00\x01")
    assert main([str(broken), str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("error:") == 2
    assert main([]) == 2
