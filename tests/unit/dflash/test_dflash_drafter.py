# SPDX-License-Identifier: Apache-2.0
"""What a drafter proposes is what training's forward pass finds likeliest at the same anchor on the same features."""

from __future__ import annotations

import pytest
import torch
from dflash_cases import TARGET, make_draft, make_strategy
from dflash_formulas import block_hidden
from specforge_dflash.rows import pack_blocks

CASES = [
    {},
    {"sliding_window": 3},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    {"num_layers": 1, "block_size": 16, "mask_token_id": 7},
]
ANCHOR = 9


def make_sample(strategy, draft):
    """One sample, trained everywhere, with room for a block at the anchor."""
    request = strategy.capture_request(TARGET.info)
    sample = TARGET.sample("decode", num_tokens=ANCHOR + draft.shape.block_size + 2, request=request)
    sample.features["loss_mask"][:] = True
    return sample


def draft_ahead(strategy, draft, sample, *, cuts=(ANCHOR,)):
    drafter = strategy.drafter(draft, TARGET)
    ids, aux, start = sample.features["input_ids"], sample.features["aux_hidden_states"], 0
    drafter.reset()
    for end in cuts:
        drafter.extend(ids[start : end + 1], {"aux_hidden_states": aux[start:end]})
        guess, start = drafter.propose(drafter.max_draft_tokens), end
    return guess


def packed(strategy, draft, sample):
    """The training forward's tables for one block at the anchor."""
    batch = strategy.collate([sample], [0])
    tensors = {**batch.tensors, "anchors": torch.tensor([[ANCHOR]]), "anchor_keep": torch.tensor([[True]])}
    offset = strategy.settings.label_offset
    return tensors, pack_blocks(tensors, block_size=draft.shape.block_size, offset=offset)


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("cuts", [(ANCHOR,), (4, 5, ANCHOR)])
@torch.no_grad()
def test_dflash_proposes_trainings_first_choices(settings, cuts):
    strategy = make_strategy("dflash", settings)
    draft = make_draft(strategy)
    sample = make_sample(strategy, draft)
    tensors, blocks = packed(strategy, draft, sample)
    states = draft.trained_states(tensors["aux_hidden_states"], blocks)
    expected = draft.target_head.logits(states).argmax(-1)
    guess = draft_ahead(strategy, draft, sample, cuts=cuts)
    assert guess.tolist() == expected.tolist()
    assert len(guess) == draft.shape.block_size - 1
    ids, aux = sample.features["input_ids"], sample.features["aux_hidden_states"]
    torch.testing.assert_close(states, block_hidden(draft, ids, aux, ANCHOR)[1:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [*CASES, {"pure_draft_prefix_len": 0}, {"pure_draft_prefix_len": 3}], ids=str)
@pytest.mark.parametrize("shift_label", [True, False])
@torch.no_grad()
def test_domino_proposes_trainings_first_choices_given_its_own_tokens(settings, shift_label):
    size = settings.get("block_size", 5)
    most = size if shift_label else size - 1
    strategy = make_strategy("domino", {**settings, "shift_label": shift_label, "max_draft_tokens": most})
    draft = make_draft(strategy)
    sample = make_sample(strategy, draft)
    guess = draft_ahead(strategy, draft, sample)
    assert len(guess) == most
    sample.features["input_ids"][ANCHOR + 1 : ANCHOR + 1 + most] = guess
    tensors, _ = packed(strategy, draft, sample)
    ones = torch.ones(size)
    scores = draft(tensors, slot_weights_K=ones, base_share=0.0)
    assert scores.final_correct_E.all(), "training would not have said what was drafted"
    assert scores.final_correct_E.shape[0] == most


@torch.no_grad()
def test_domino_correction_changes_what_is_said():
    strategy = make_strategy("domino", {})
    draft = make_draft(strategy)
    sample = make_sample(strategy, draft)
    corrected = draft_ahead(strategy, draft, sample)
    draft.correction_layers()[1].weight.zero_()
    plain = draft_ahead(strategy, draft, sample)
    assert corrected[0] == plain[0]
    assert corrected.tolist() != plain.tolist()


def test_servers_block_bounds_what_is_proposed():
    for name, settings, most in [
        ("dflash", {}, 4),
        ("dflash", {"max_draft_tokens": 2}, 2),
        ("dflash", {"max_draft_tokens": 9}, 4),
        ("domino", {}, 4),
        ("domino", {"max_draft_tokens": 9}, 5),
        ("domino", {"max_draft_tokens": 9, "shift_label": False}, 4),
    ]:
        strategy = make_strategy(name, settings)
        assert strategy.drafter(make_draft(strategy), TARGET).max_draft_tokens == most


def test_propose_before_extend_is_an_error():
    strategy = make_strategy("dflash", {})
    with pytest.raises(ValueError, match="extend"):
        strategy.drafter(make_draft(strategy), TARGET).propose(3)
