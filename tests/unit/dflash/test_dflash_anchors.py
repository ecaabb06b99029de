# SPDX-License-Identifier: Apache-2.0
"""Anchors and losses depend on a sample and its seed, not on what else is in the batch, padding or dealing."""

from __future__ import annotations

import pytest
import torch
from dflash_cases import assert_close, make_draft, make_samples, make_strategy, run_batches
from specforge_dflash.anchors import choose_anchors, label_blocks, pad_anchors, slot_weights

SEEDS = [21, 22, 23, 24]
CUTS = ([[0, 1, 2, 3]], [[3, 1, 0, 2]], [[0], [1], [2], [3]], [[1, 3], [2, 0]])


def anchors_of(strategy, batch, row):
    return batch.tensors["anchors"][row][batch.tensors["anchor_keep"][row]].tolist()


def test_anchors_stand_where_two_adjacent_tokens_are_trained():
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert choose_anchors(mask, num_anchors=10, seed=0).tolist() == [1, 4, 5]
    assert choose_anchors(torch.zeros(5), num_anchors=10, seed=0).tolist() == []
    assert choose_anchors(torch.ones(1), num_anchors=10, seed=0).tolist() == []


def test_anchors_are_a_sorted_uniform_choice_of_their_seed():
    mask, drawn = torch.ones(41), torch.zeros(41)
    for seed in range(400):
        anchors = choose_anchors(mask, num_anchors=8, seed=seed)
        assert anchors.tolist() == sorted(set(anchors.tolist()))
        assert anchors.tolist() == choose_anchors(mask, num_anchors=8, seed=seed).tolist()
        drawn[anchors] += 1
    assert drawn[40] == 0
    assert 40 < drawn[:40].min() <= drawn[:40].max() < 130  # 80 expected of each


def test_anchors_do_not_depend_on_the_batch():
    strategy = make_strategy("dflash", {"num_anchors": 3})
    samples = make_samples(strategy)
    alone = [anchors_of(strategy, strategy.collate([s], [seed]), 0) for s, seed in zip(samples, SEEDS, strict=True)]
    for order in ([0, 1, 2, 3], [3, 1], [2, 0, 1, 3]):
        batch = strategy.collate([samples[i] for i in order], [SEEDS[i] for i in order])
        assert [anchors_of(strategy, batch, row) for row in range(len(order))] == [alone[i] for i in order]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dflash", {"loss_decay_gamma": 7.0, "num_anchors": 4}),
        ("dflash", {"loss_type": "dpace", "sliding_window": 4}),
        ("domino", {"num_anchors": 3}),
        ("domino", {"shift_label": False, "sliding_window": 5}),
    ],
)
def test_losses_do_not_depend_on_how_samples_are_dealt(name, settings):
    strategy = make_strategy(name, settings)
    draft, samples = make_draft(strategy), make_samples(strategy)
    results = []
    for cut in CUTS:
        batches = [strategy.collate([samples[i] for i in part], [SEEDS[i] for i in part]) for part in cut]
        loss, grads, _ = run_batches(strategy, draft, batches)
        results.append((loss, grads))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_close(grads, results[0][1])


@pytest.mark.parametrize("name", ["dflash", "domino"])
def test_padding_changes_nothing(name):
    strategy = make_strategy(name, {"num_anchors": 4})
    draft, samples = make_draft(strategy), make_samples(strategy)
    plain = strategy.collate(samples[:2], SEEDS[:2])
    # The long idle sample trains nothing, but pads the others to its length.
    idle = make_samples(strategy, [70])[0]
    idle.features["loss_mask"][:] = False
    padded = strategy.collate([*samples[:2], idle], SEEDS[:3])
    assert padded.denominators["weights"] == plain.denominators["weights"]
    loss, grads, _ = run_batches(strategy, draft, [plain])
    padded_loss, padded_grads, _ = run_batches(strategy, draft, [padded])
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    assert_close(padded_grads, grads, limit=1e-5)


def test_a_block_that_trains_nothing_changes_nothing():
    strategy = make_strategy("dflash", {})
    draft = make_draft(strategy)
    batch = strategy.collate(make_samples(strategy), SEEDS)
    loss, grads, _ = run_batches(strategy, draft, [batch])
    tensors = dict(batch.tensors)
    last = tensors["input_ids"].shape[1] - 1  # nothing follows it, so its block has no trained slot
    tensors["anchors"] = torch.nn.functional.pad(tensors["anchors"], (0, 1), value=last)
    tensors["anchor_keep"] = torch.nn.functional.pad(tensors["anchor_keep"], (0, 1), value=True)
    more = type(batch)(tensors, strategy.count(tensors), batch.num_samples, batch.num_tokens)
    assert more.denominators == batch.denominators
    more_loss, more_grads, _ = run_batches(strategy, draft, [more])
    assert more_loss == loss
    assert_close(more_grads, grads, limit=1e-6)


def test_an_anchor_at_the_first_token_sees_no_context():
    strategy = make_strategy("dflash", {"num_anchors": 100})
    (sample,) = make_samples(strategy, [12])
    sample.features["loss_mask"][:] = True
    batch = strategy.collate([sample], [0])
    assert anchors_of(strategy, batch, 0) == list(range(11))
    loss, grads, _ = run_batches(strategy, make_draft(strategy), [batch])
    assert loss == loss
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())


def test_labels_and_weights_in_both_modes():
    ids, mask = torch.arange(10, 18)[None], torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1]]).bool()
    anchors = pad_anchors([torch.tensor([3, 6])])
    plain = label_blocks(ids, mask, anchors, block_size=4, offset=0)
    assert plain.tokens_BNK[0, 0].tolist() == [13, 14, 15, 16]
    assert plain.trained_BNK[0].int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    shifted = label_blocks(ids, mask, anchors, block_size=4, offset=1)
    assert shifted.tokens_BNK[0, 0].tolist() == [14, 15, 16, 17]
    assert shifted.trained_BNK[0].int().tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]


def test_slot_weights_decay_from_the_first_guess():
    assert slot_weights(4, gamma=None, offset=0).tolist() == [1, 1, 1, 1]
    e = 2.718281828
    assert slot_weights(4, gamma=1.0, offset=0).tolist() == pytest.approx([1, 1, 1 / e, 1 / e**2])
    assert slot_weights(4, gamma=1.0, offset=1).tolist() == pytest.approx([1, 1 / e, 1 / e**2, 1 / e**3])
