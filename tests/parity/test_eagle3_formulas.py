# SPDX-License-Identifier: Apache-2.0
"""The fused training step equals the formulas written out, over shapes, masks, paddings and loss types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from eagle3_cases import MASKS, as_batch, make_draft, make_tensors
from eagle3_formulas import plain_loss
from specforge_core.contracts import StepContext
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy

torch.set_num_threads(1)

CASES = [
    ("none", "full", {}, {}),
    ("none", "spans", {}, {"ttt_steps": 3}),
    ("none", "start_only", {}, {}),
    ("none", "end_only", {}, {"loss_normalizer": "positions"}),
    ("none", "one_sample", {"num_key_value_heads": 1}, {}),
    ("none", "shorter_than_unroll", {"num_key_value_heads": 4}, {}),
    ("none", "spans", {"draft_vocab_size": 61}, {"ttt_steps": 1}),
    ("none", "spans", {"draft_vocab_size": 3}, {}),
    ("none", "full", {"fc_norm": True, "num_aux": 2}, {}),
    ("none", "full", {"norm_output": False}, {}),
    ("none", "spans", {"last_hidden_norm": "pre"}, {}),
    ("none", "spans", {"target_hidden_size": 24, "head_dim": 16}, {"step_decay": 1.0}),
    ("alpha", "full", {}, {}),
    ("alpha", "start_only", {}, {"loss_normalizer": "positions"}),
    ("alpha", "spans", {"draft_vocab_size": 3}, {"ttt_steps": 9}),
    ("lambda", "full", {}, {"kl_scale": 0.5, "kl_decay": 2.0}),
    ("lambda", "start_only", {}, {"kl_scale": 0.5, "loss_normalizer": "positions"}),
    ("lambda", "spans", {"draft_vocab_size": 2}, {"kl_scale": 0.7}),
    ("lambda", "spans", {"draft_vocab_size": 61}, {}),
]


def run_strategy(draft, batch, options):
    strategy = Eagle3Strategy(Eagle3Config(**options))
    context = StepContext(step=0, total_steps=1, denominators=batch.denominators)
    if strategy.measures:
        with torch.no_grad():
            context = replace(context, measured=strategy.measure(draft, batch, context))
    output = strategy.loss(draft, batch, context)
    loss = sum(t.weight * t.numerator / batch.denominators[t.denominator] for t in output.terms)
    return loss, output


def assert_same_gradients(draft, reference, *, limit=5e-5):
    for name, parameter in draft.named_parameters():
        expected = dict(reference.named_parameters())[name].grad
        if expected is None:
            expected = torch.zeros_like(parameter)
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        scale = expected.abs().max().clamp_min(1e-2)
        assert ((got - expected).abs().max() / scale).item() < limit, name


@pytest.mark.parametrize(("loss_type", "mask", "shape", "options"), CASES)
@pytest.mark.parametrize("padding", ["none", "right", "left", "hole"])
def test_loss_metrics_and_gradients_equal_the_formulas(loss_type, mask, shape, options, padding):
    draft, reference = make_draft(**shape), make_draft(**shape)
    tensors = make_tensors(draft, getattr(MASKS, mask))
    length = tensors["input_ids"].shape[1]
    valid = torch.ones(2, length, dtype=torch.int64)
    if padding == "right":
        valid[1, length - 3 :] = 0  # trained positions there stay trained: the mask alone decides
    elif padding == "left":
        valid[0, :3] = 0
        tensors["loss_mask"][0, :3] = False  # a row that sees no key at all has no defined attention
    elif padding == "hole":
        valid[:, 2] = 0
    if padding != "none":
        tensors["attention_mask"] = valid
    options = {"ttt_steps": 7, "kl_scale": 1.0, "kl_decay": 3.0, "loss_normalizer": "tokens", **options}
    options["lk_loss_type"] = loss_type
    expected = plain_loss(reference, tensors, options)
    if padding == "left":  # rows in front of the first key predict trained positions from nothing
        trained = tensors["loss_mask"][0]
        if bool(trained[: 3 + options["ttt_steps"]].any()):
            pytest.skip("rows without any key are trained by this mask")
    loss, output = run_strategy(draft, as_batch(tensors), options)
    expected.loss.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=2e-6, abs=1e-6)
    assert [(r.numerator, r.denominator) for r in output.position_accuracy] == expected.accuracy
    got = [output.metrics[f"acceptance_rate_{k}"].value or 0.0 for k in range(options["ttt_steps"])]
    assert got == pytest.approx(expected.acceptance, rel=1e-5, abs=1e-7)
    assert_same_gradients(draft, reference)


def test_long_sequences_agree_too():
    """More rows than one block of the fused attention, and several chunks of the fused loss."""
    draft, reference = make_draft(), make_draft()
    mask = torch.zeros(2, 300)
    mask[0, 100:290] = 1
    mask[1, 40:60] = 1
    mask[1, 200:230] = 1
    tensors = make_tensors(draft, mask)
    options = {"ttt_steps": 4, "kl_scale": 1.0, "kl_decay": 3.0, "loss_normalizer": "tokens", "lk_loss_type": "none"}
    expected = plain_loss(reference, tensors, options)
    loss, _ = run_strategy(draft, as_batch(tensors), options)
    expected.loss.backward()
    loss.backward()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)
    assert_same_gradients(draft, reference)
