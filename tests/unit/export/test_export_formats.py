# SPDX-License-Identifier: Apache-2.0
"""What each export format says, in each server's own words, and that both read back to the same draft."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from dflash_cases import TARGET, make_draft, make_strategy
from safetensors.torch import load_file, save_file
from specforge_core.contracts import ExportError
from specforge_core.testing.synthetic import SyntheticTarget
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy

EAGLE3 = {"draft_vocab_size": 40, "ttt_steps": 4, "aux_layer_ids": [0, 5, 9]}


def write_eagle3(directory, format, **settings):
    strategy, target = Eagle3Strategy(Eagle3Config(**{**EAGLE3, **settings})), SyntheticTarget()
    draft = strategy.build_draft(target)
    strategy.export(draft, directory, format=format, target=target.info)
    return strategy, draft, json.loads((directory / "config.json").read_text())


def write_dflash(directory, format, **settings):
    strategy = make_strategy("dflash", settings)
    draft = make_draft(strategy)
    strategy.export(draft, directory, format=format, target=TARGET.info)
    return strategy, draft, json.loads((directory / "config.json").read_text())


def same_state(left, right):
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize(
    "settings", [{}, {"fc_norm": True}, {"norm_output": False}, {"draft_vocab_size": None}, {"aux_layer_ids": [1, 4]}]
)
def test_eagle3_reads_back_what_it_wrote(tmp_path, format, settings):
    strategy, draft, _ = write_eagle3(tmp_path, format, **settings)
    read = strategy.load_export(tmp_path, SyntheticTarget())
    assert same_state(draft, read)
    assert read.shape == draft.shape


def test_eagle3_in_the_eagle_layout_counts_layers_for_either_server(tmp_path):
    _, _, config = write_eagle3(tmp_path, "sglang")
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 5, 9]  # SGLang adds one itself
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 6, 10]  # vLLM does not
    assert "norm_output" not in config  # vLLM means something else by it
    assert "midlayer.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")


def test_eagle3_in_the_speculators_format(tmp_path):
    _, draft, config = write_eagle3(tmp_path, "speculators")
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(weights["layers.0.self_attn.q_proj.weight"], draft.midlayer.self_attn.q_proj.weight)
    assert torch.equal(weights["d2t"], draft.d2t)
    assert not [name for name in weights if "midlayer" in name or "embed" in name]
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 6, 10]
    assert [config[name] for name in ("norm_before_residual", "norm_before_fc")] == [False, False]
    assert "norm_output" not in config
    (method,) = config["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == 4
    assert config["speculators_config"]["verifier"]["name_or_path"] == SyntheticTarget().info.name_or_path
    assert config["transformer_layer_config"]["rope_theta"] == 10000.0
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 3


def test_a_draft_that_knows_every_token_has_no_map_there(tmp_path):
    write_eagle3(tmp_path, "speculators", draft_vocab_size=None)
    assert not {"t2d", "d2t"} & set(load_file(tmp_path / "model.safetensors"))


def test_a_norm_that_the_draft_does_not_use_is_not_handed_to_servers(tmp_path):
    strategy, target = Eagle3Strategy(Eagle3Config(**EAGLE3, norm_output=False)), SyntheticTarget()
    draft = strategy.build_draft(target)
    with torch.no_grad():
        draft.norm.weight[0] = 2.0
    with pytest.raises(ExportError, match="not all ones"):
        strategy.export(draft, tmp_path, format="speculators", target=target.info)


def test_the_target_is_named_so_that_a_server_started_elsewhere_finds_it(tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path)
    strategy, target = Eagle3Strategy(Eagle3Config(**EAGLE3)), SyntheticTarget()
    info = replace(target.info, name_or_path="target")
    strategy.export(strategy.build_draft(target), tmp_path / "export", format="speculators", target=info)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str((tmp_path / "target").resolve())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculators_model_type": "dflash"}, "type 'dflash'"),
        ({"norm_before_residual": True}, "norm_before_residual is true"),
        ({"norm_before_residual": None}, "norm_before_residual is true"),
        ({"norm_output": True}, "norm_output is true"),
        ({"transformer_layer_config": None}, "'transformer_layer_config' is missing"),
        ({"eagle_aux_hidden_state_layer_ids": None}, "'eagle_aux_hidden_state_layer_ids' is missing"),
    ],
)
def test_eagle3_refuses_a_draft_that_is_wired_otherwise(tmp_path, changes, words):
    strategy, _, _ = write_eagle3(tmp_path, "speculators")
    edit(tmp_path, **changes)
    with pytest.raises(ExportError, match=words) as refused:
        strategy.load_export(tmp_path, SyntheticTarget())
    assert "config.json" in str(refused.value.where)


def test_a_missing_weight_is_named_in_our_words(tmp_path):
    strategy, _, _ = write_eagle3(tmp_path, "speculators")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.0.hidden_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match=r"midlayer\.hidden_norm\.weight is missing"):
        strategy.load_export(tmp_path, SyntheticTarget())


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}])
def test_dflash_reads_back_what_it_wrote(tmp_path, format, settings):
    strategy, draft, _ = write_dflash(tmp_path, format, **settings)
    read = strategy.load_export(tmp_path, TARGET)
    assert same_state(draft, read)
    assert read.shape == draft.shape


@pytest.mark.parametrize(("settings", "both_ways"), [({}, True), ({"sliding_window": 6}, False)])
def test_dflash_in_the_speculators_format(tmp_path, settings, both_ways):
    _, draft, config = write_dflash(tmp_path, "speculators", **settings)
    assert set(load_file(tmp_path / "model.safetensors")) == set(draft.state_dict())
    assert config["speculators_model_type"] == "dflash"
    assert config["aux_hidden_state_layer_ids"] == [2, 10]
    assert (config["mask_token_id"], config["block_size"], config["sample_from_anchor"]) == (66, 5, False)
    assert config["sliding_window_non_causal"] is both_ways
    (method,) = config["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speculators_model_type": "eagle3"}, "type 'eagle3'"),
        ({"sample_from_anchor": True}, "sample_from_anchor is true"),
        ({"sliding_window_non_causal": False}, "sliding_window_non_causal"),
        ({"mask_token_id": None}, "'mask_token_id' is missing"),
    ],
)
def test_dflash_refuses_a_draft_that_guesses_otherwise(tmp_path, changes, words):
    strategy, _, _ = write_dflash(tmp_path, "speculators")
    edit(tmp_path, **changes)
    with pytest.raises(ExportError, match=words) as refused:
        strategy.load_export(tmp_path, TARGET)
    assert "config.json" in str(refused.value.where)


def test_domino_says_why_it_has_one_format(tmp_path):
    strategy = make_strategy("domino", {})
    with pytest.raises(ExportError, match="correction head"):
        strategy.export(make_draft(strategy), tmp_path, format="speculators", target=TARGET.info)
