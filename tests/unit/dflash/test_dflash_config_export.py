# SPDX-License-Identifier: Apache-2.0
"""Settings of DFlash and Domino, and the files servers load."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from dflash_cases import TARGET, make_draft, make_strategy
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from specforge_core.contracts import ConfigError, ExportError
from specforge_core.testing.synthetic import TINY_INFO, SyntheticTarget
from specforge_dflash.config import DflashConfig, default_aux_layers
from specforge_domino.config import DominoConfig


@pytest.mark.parametrize(
    ("target", "draft", "layers"),
    [
        (36, 5, (1, 9, 17, 25, 33)),
        (28, 5, (1, 7, 13, 19, 25)),
        (24, 5, (1, 6, 11, 16, 21)),
        (36, 4, (1, 12, 22, 33)),
        (12, 3, (1, 5, 9)),
        (36, 1, (18,)),
        (7, 3, (1, 2, 4)),  # 2.5 rounds to 2
        (9, 3, (1, 4, 6)),  # 3.5 rounds to 4
    ],
)
def test_default_layers_round_half_to_even(target, draft, layers):
    assert default_aux_layers(target, draft) == layers


def test_a_shallow_target_needs_named_layers():
    info = replace(TINY_INFO, num_layers=6)
    with pytest.raises(ConfigError, match="no default layers"):
        DflashConfig().capture_request(info)
    named = DflashConfig(aux_layer_ids=[0, 2, 5], num_layers=2)
    assert named.capture_request(info).aux_layer_ids == (0, 2, 5)
    assert named.shape(info).num_aux == 3
    for bad in ([0, 6], [1, 1]):
        with pytest.raises(ConfigError):
            DflashConfig(aux_layer_ids=bad).capture_request(info)


def test_mask_token_is_explicit_or_the_last_row_that_is_not_special():
    assert DflashConfig(mask_token_id=9).shape(TINY_INFO).mask_token_id == 9
    assert DflashConfig().shape(TINY_INFO).mask_token_id == TINY_INFO.vocab_size - 1
    special = replace(TINY_INFO, eos_token_ids=(66, 64), bos_token_id=65)
    assert DflashConfig().shape(special).mask_token_id == 63
    assert DflashConfig(mask_token_id=67).check(TINY_INFO)


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 5},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
    ],
)
def test_settings_that_do_not_fit_say_what_to_change(settings):
    (problem,) = DflashConfig(**settings).check(TINY_INFO)
    assert "strategy." in problem
    with pytest.raises(ConfigError):
        DflashConfig(**settings).shape(TINY_INFO)


def test_optimizer_defaults_are_the_familys():
    for config in (DflashConfig, DominoConfig):
        defaults = config.optimizer_defaults
        assert (defaults.learning_rate, defaults.warmup_ratio, defaults.max_grad_norm) == (6e-4, 0.04, 1.0)
    with pytest.raises(ValidationError):
        DominoConfig(loss_type="dpace")


def exported(tmp_path, name, settings, *, dtype=torch.float32):
    strategy = make_strategy(name, settings)
    draft = make_draft(strategy).to(dtype)
    strategy.export(draft, tmp_path, format="sglang", target=TARGET.info)
    return strategy, draft, json.loads((tmp_path / "config.json").read_text())


def test_dflash_files(tmp_path):
    _, draft, config = exported(tmp_path, "dflash", {"sliding_window": 6})
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {"mask_token_id": 66, "target_layer_ids": [1, 9]}
    assert (config["block_size"], config["num_hidden_layers"], config["num_target_layers"]) == (5, 2, 12)
    assert config["layer_types"] == ["sliding_attention"] * 2
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(dict(draft.named_parameters()))
    assert {"fc.weight", "hidden_norm.weight", "norm.weight", "layers.1.self_attn.q_norm.weight"} <= names
    assert not [name for name in names if "embed_tokens" in name or "head" in name]


def test_domino_files_are_dflashs_with_a_projector(tmp_path):
    _, draft, config = exported(tmp_path, "domino", {"shift_label": False, "pure_draft_prefix_len": 2})
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {
        "mask_token_id": 66,
        "target_layer_ids": [1, 9],
        "projector_type": "domino",
        "emb_dim": 8,
        "gru_hidden_dim": 12,
        "pure_draft_prefix_len": 2,
        "shift_label": False,
    }
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "model.safetensors").items()}
    assert shapes["prefix_gru.weight_ih_l0"] == [36, 32]
    assert shapes["prefix_gru.weight_hh_l0"] == [36, 12]
    assert shapes["embed_proj.0.weight"] == [8, 44]
    assert shapes["embed_proj.2.weight"] == [67, 8]
    assert set(shapes) == set(dict(draft.named_parameters()))


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_bfloat16_exports_reload_in_bfloat16(tmp_path, name):
    strategy, draft, config = exported(tmp_path, name, {}, dtype=torch.bfloat16)
    assert config["torch_dtype"] == "bfloat16"
    for key, value in strategy.load_export(tmp_path, TARGET).state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, draft.state_dict()[key])


def test_one_familys_export_is_not_the_others(tmp_path):
    for name, other in (("dflash", "domino"), ("domino", "dflash")):
        directory = tmp_path / name
        directory.mkdir()
        exported(directory, name, {})
        with pytest.raises(ExportError, match=r"not a (plain DFlash|Domino) draft"):
            make_strategy(other, {}).load_export(directory, TARGET)


def test_damaged_exports_are_refused(tmp_path):
    strategy, _, config = exported(tmp_path, "dflash", {})
    with pytest.raises(ExportError, match="the target has 50"):
        strategy.load_export(tmp_path, SyntheticTarget(replace(TINY_INFO, vocab_size=50)))
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"norm\.weight is missing"):
        strategy.load_export(tmp_path, TARGET)
    save_file({**weights, "norm.weight": norm[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"norm\.weight is \[31\]"):
        strategy.load_export(tmp_path, TARGET)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ExportError, match="unreadable"):
        strategy.load_export(tmp_path, TARGET)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="no such file"):
        strategy.load_export(tmp_path, TARGET)
    del config["block_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="block_size"):
        strategy.load_export(tmp_path, TARGET)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ExportError, match="not JSON"):
        strategy.load_export(tmp_path, TARGET)
