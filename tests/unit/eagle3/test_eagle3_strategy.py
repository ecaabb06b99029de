# SPDX-License-Identifier: Apache-2.0
"""EAGLE3's settings, errors and dtypes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from specforge_core.contracts import ConfigError, DataError, ExportError, StepContext
from specforge_core.testing.synthetic import TINY_INFO, SyntheticTarget
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy

torch.set_num_threads(1)


class NoData(SyntheticTarget):
    def token_counts(self):
        raise DataError("no training data is at hand")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aux_layer_ids": [1, 12]}, "layer 12 does not exist"),
        ({"aux_layer_ids": [-1]}, "layer -1 does not exist"),
        ({"aux_layer_ids": [3, 3]}, "named twice"),
    ],
)
def test_layers_that_do_not_exist_are_refused_with_the_range(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Eagle3Config(**settings).capture_request(TINY_INFO)
    assert caught.value.where == "strategy.aux_layer_ids"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"draft_vocab_size": 68}, "strategy.draft_vocab_size"),
        ({"num_key_value_heads": 3}, "strategy.num_key_value_heads"),
        ({"num_attention_heads": 5}, "strategy.num_attention_heads"),
    ],
)
def test_settings_that_do_not_fit_the_target_are_listed(settings, words):
    (problem, *_) = Eagle3Config(**settings).check(TINY_INFO)
    assert words in problem
    with pytest.raises(ConfigError):
        Eagle3Strategy(Eagle3Config(**settings)).build_draft(SyntheticTarget())


def test_all_problems_are_listed_at_once():
    assert len(Eagle3Config(draft_vocab_size=99, num_key_value_heads=3).check(TINY_INFO)) == 2


@pytest.mark.parametrize("settings", [{"ttt_steps": 0}, {"lk_loss_type": "beta"}, {"draft_vocabsize": 3}])
def test_unusable_values_are_refused(settings):
    with pytest.raises(ValidationError):
        Eagle3Config(**settings)


def test_a_draft_vocabulary_without_counts_is_an_error_and_a_full_one_needs_none():
    with pytest.raises(DataError, match="no training data"):
        Eagle3Strategy(Eagle3Config(draft_vocab_size=20)).build_draft(NoData())
    assert Eagle3Strategy(Eagle3Config()).build_draft(NoData()).d2t.abs().sum() == 0


def _loss(strategy, draft, batch):
    output = strategy.loss(draft, batch, StepContext(0, 1, batch.denominators))
    (term,) = output.terms
    return term.numerator / batch.denominators[term.denominator]


def test_bf16_parameters_train_to_about_the_same_loss():
    target, strategy = SyntheticTarget(), Eagle3Strategy(Eagle3Config(draft_vocab_size=40, ttt_steps=3))
    torch.manual_seed(0)
    draft = strategy.build_draft(target)
    request = strategy.capture_request(target.info)
    batch = strategy.collate([target.sample(f"p{i}", num_tokens=20, request=request) for i in range(3)], range(3))
    expected = _loss(strategy, draft, batch)
    draft.bfloat16()
    loss = _loss(strategy, draft, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in draft.parameters())
    drafter = strategy.drafter(draft, target)
    drafter.extend(torch.arange(6), {"aux_hidden_states": torch.randn(5, 3, 32)})
    assert drafter.propose(3).shape == (3,)


def test_the_same_batch_gives_the_same_bits():
    target, strategy = SyntheticTarget(), Eagle3Strategy(Eagle3Config(draft_vocab_size=40, ttt_steps=3))
    request = strategy.capture_request(target.info)
    batch = strategy.collate([target.sample(f"p{i}", num_tokens=20, request=request) for i in range(3)], range(3))
    grads = []
    for _ in range(2):
        torch.manual_seed(0)
        draft = strategy.build_draft(target)
        _loss(strategy, draft, batch).backward()
        grads.append([p.grad for p in draft.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.fixture
def export(tmp_path):
    strategy, target = Eagle3Strategy(Eagle3Config(draft_vocab_size=40)), SyntheticTarget()
    strategy.export(strategy.build_draft(target), tmp_path, format="sglang", target=target.info)
    return tmp_path


def _edit(directory, **changes):
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_export_is_laid_out_as_servers_expect(export):
    from safetensors import safe_open

    config = json.loads((export / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 5, 8]
    assert (config["vocab_size"], config["draft_vocab_size"], config["num_hidden_layers"]) == (67, 40, 1)
    with safe_open(export / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert {"fc.weight", "norm.weight", "lm_head.weight", "t2d", "d2t"} < names
    assert "midlayer.self_attn.q_proj.weight" in names
    assert not any("embed" in name or "target" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 68}, "vocabulary of 68"),
        ({"architectures": ["LlamaForCausalLM"]}, "not the config"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"intermediate_size": 7}, "expected"),
        ({"fc_norm": True}, "fc_norm.0.weight is missing"),
    ],
)
def test_an_export_that_does_not_fit_is_explained(export, changes, words):
    _edit(export, **changes)
    with pytest.raises(ExportError, match=words):
        Eagle3Strategy(Eagle3Config(draft_vocab_size=40)).load_export(export, SyntheticTarget())


def test_a_truncated_export_is_explained(export):
    path = export / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ExportError, match="unreadable"):
        Eagle3Strategy(Eagle3Config()).load_export(export, SyntheticTarget())
    path.unlink()
    with pytest.raises(ExportError, match="no such file"):
        Eagle3Strategy(Eagle3Config()).load_export(export, SyntheticTarget())


def test_another_targets_vocabulary_is_refused(export):
    other = SyntheticTarget(replace(TINY_INFO, vocab_size=99))
    with pytest.raises(ExportError, match="the target has 99"):
        Eagle3Strategy(Eagle3Config()).load_export(export, other)
