# SPDX-License-Identifier: Apache-2.0
"""Chunked head and loss equal unchunked ones; the head runs only where slots are trained; bf16 works."""

from __future__ import annotations

import pytest
import torch
from dflash_cases import TARGET, assert_close, make_draft, make_samples, make_strategy, run_batches
from specforge_core.contracts import StepContext, TargetError, simulated_acceptance_length
from specforge_core.modeling import FrozenHead
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.loss import (
    _CHUNK_ELEMENTS,
    SlotScores,
    accepted_lengths,
    dpace_weights,
    score_slots,
    softmax_chunk,
)
from specforge_dflash.rows import pack_blocks
from torch.nn import functional


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_chunked_equals_unchunked(name, monkeypatch):
    strategy = make_strategy(name, {"loss_decay_gamma": 7.0})
    draft, batch = make_draft(strategy), strategy.collate(make_samples(strategy), range(4))
    vocab_size = draft.shape.vocab_size
    results = []
    for elements in (10**9, 7 * vocab_size, 1):
        monkeypatch.setitem(_CHUNK_ELEMENTS, "cpu", elements)
        loss, grads, _ = run_batches(strategy, draft, [batch])
        results.append((loss, grads))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert_close(grads, results[0][1], limit=1e-5)


def test_head_runs_at_trained_slots_only():
    strategy = make_strategy("dflash", {})
    draft, batch = make_draft(strategy), strategy.collate(make_samples(strategy), range(4))
    scores = draft(batch.tensors)
    assert scores.loss_E.shape[0] == int(batch.denominators["weights"])
    assert scores.loss_E.shape[0] < batch.tensors["anchors"].numel() * draft.shape.block_size


def test_gradient_is_that_of_torchs_cross_entropy():
    torch.manual_seed(0)
    states, head = torch.randn(9, 16, requires_grad=True), FrozenHead(50, 16, norm_eps=None)
    head.load(torch.randn(50, 16))
    labels, weights = torch.randint(50, (9,)), torch.rand(9)

    class Blocks:
        labels_E = labels

    scores = score_slots(Blocks(), states, head, chunk=4)
    expected = functional.cross_entropy(states @ head.weight.T, labels, reduction="none")
    torch.testing.assert_close(scores.loss_E, expected)
    (found,) = torch.autograd.grad((scores.loss_E * weights).sum(), states)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), states)[0])
    with torch.no_grad():
        assert not score_slots(Blocks(), states.detach(), head).loss_E.requires_grad


def test_ties_go_to_the_first_token():
    logits = torch.tensor([[1.0, 3.0, 3.0], [3.0, 1.0, 3.0]])
    assert softmax_chunk(logits, torch.tensor([1, 2])).correct_X.tolist() == [True, False]


def test_a_head_that_was_never_loaded_is_an_error():
    strategy = make_strategy("dflash", {})
    draft = DflashDraft(strategy.config.shape(TARGET.info))
    batch = strategy.collate(make_samples(strategy), range(4))
    assert torch.isnan(draft.embed_tokens.weight).all()
    with pytest.raises(TargetError, match="never loaded"):
        draft(batch.tensors)


def make_scores(losses, trained):
    """Scores of one block whose trained slots have these losses."""

    class Layout:
        block_size = len(trained)
        num_rows = len(trained)

    class Blocks:
        layout = Layout()
        trained_E = torch.tensor(trained).nonzero().flatten()

    return SlotScores(Blocks(), torch.tensor(losses), torch.zeros(len(losses), dtype=torch.bool))


def test_dpace_weights_by_hand():
    # Slots 1 and 3 of four are trained; q = 0.5 and 0.25, so with alpha 0: s = 1, 0.5, 1, 0.25.
    scores = make_scores([0.5, 0.25], [0, 1, 0, 1])
    scores = SlotScores(scores.blocks, -scores.loss_E.log(), scores.correct_E)
    reach = dpace_weights(scores, loss_type="dpace-cumulative-confidence-only", alpha=0.0)
    value = dpace_weights(scores, loss_type="dpace-continuation-value-only", alpha=0.0)
    both = dpace_weights(scores, loss_type="dpace", alpha=0.0)
    assert reach.tolist() == pytest.approx([0.5, 0.125])
    assert both.tolist() == pytest.approx([0.625, 0.125])
    assert value.tolist() == pytest.approx([1.25, 1.0])


def test_dpace_survives_hopeless_slots():
    scores = make_scores([1e4, 1e4], [0, 1, 1])
    for loss_type in ("dpace", "dpace-continuation-value-only"):
        assert torch.isfinite(dpace_weights(scores, loss_type=loss_type, alpha=0.0)).all()


def test_accepted_lengths_pass_untrained_slots():
    scores = make_scores([0.0, 0.0, 0.0], [0, 1, 0, 1, 1])
    assert accepted_lengths(scores.blocks, torch.tensor([True, True, False])).tolist() == [2]
    assert accepted_lengths(scores.blocks, torch.tensor([False, True, True])).tolist() == [0]


@pytest.mark.parametrize(("name", "count"), [("dflash", 4), ("domino", 4)])
def test_position_accuracy_is_per_drafted_token(name, count):
    strategy = make_strategy(name, {})
    draft, batch = make_draft(strategy), strategy.collate(make_samples(strategy), range(4))
    with torch.no_grad():
        _, _, (output,) = run_batches(strategy, draft, [batch])
    offset = strategy.settings.label_offset
    blocks = pack_blocks(batch.tensors, block_size=5, offset=offset)
    counted = [int((blocks.trained_slots == slot + 1 - offset).sum()) for slot in range(count)]
    assert [int(r.denominator) for r in output.position_accuracy] == counted
    assert simulated_acceptance_length(output.position_accuracy) >= 1


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_bfloat16_parameters_give_about_the_same(name):
    strategy = make_strategy(name, {"sliding_window": 6})
    draft, batch = make_draft(strategy, scale=2.0), strategy.collate(make_samples(strategy), range(4))
    expected, grads, _ = run_batches(strategy, draft, [batch])
    found, rough, _ = run_batches(strategy, draft.to(torch.bfloat16), [batch])
    assert found == pytest.approx(expected, rel=2e-2)
    for name_, grad in grads.items():
        assert rough[name_].dtype == torch.bfloat16
        cosine = functional.cosine_similarity(rough[name_].float().flatten(), grad.flatten(), dim=0)
        assert cosine > 0.97, name_


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_evaluation_keeps_no_gradient(name):
    strategy = make_strategy(name, {})
    draft, batch = make_draft(strategy), strategy.collate(make_samples(strategy), range(4))
    with torch.no_grad():
        output = strategy.loss(draft, batch, StepContext(step=0, total_steps=1, denominators=batch.denominators))
    assert not output.terms[0].numerator.requires_grad
