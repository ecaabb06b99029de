# SPDX-License-Identifier: Apache-2.0
"""Drafting repeats what training unrolled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from specforge_core.contracts import TargetInfo
from specforge_core.modeling import VocabMap
from specforge_eagle3.config import DraftShape, Eagle3Config
from specforge_eagle3.draft_model import Eagle3Draft
from specforge_eagle3.drafter import Eagle3Drafter
from specforge_eagle3.rows import select_rows
from specforge_eagle3.unroll import unroll

torch.set_num_threads(1)
STEPS, LENGTH = 5, 20


@pytest.fixture(params=[{}, {"norm_output": False}, {"fc_norm": True, "num_key_value_heads": 4}], ids=str)
def draft(request):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 61,
        "draft_vocab_size": 30,
        "hidden_size": 32,
        "target_hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0},
        **request.param,
    }
    draft = Eagle3Draft(DraftShape(**settings), VocabMap.from_counts(torch.randint(0, 9, (61,)), 30))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    draft.embed_tokens.load(torch.randn(61, 32))
    draft.target_head.load(torch.randn(61, 32))
    return draft


@torch.no_grad()
def unrolled_guesses(draft, ids, aux, position):
    """Guesses of every unroll step at one position, as training computes them."""
    mask = torch.zeros(1, ids.shape[0], dtype=torch.bool)
    mask[0, position] = True
    rows = select_rows(ids[None], mask, steps=STEPS)
    hidden = unroll(draft, ids[None], aux[None], rows=rows, steps=STEPS)
    row = int((rows.positions_R == position).nonzero())
    guess = draft.lm_head(hidden[:, row]).argmax(-1)
    return (guess + draft.d2t[guess]).tolist()


@pytest.mark.parametrize("known", [1, 4, 11])
def test_proposals_are_the_unrolls_guesses_when_they_are_the_text(draft, known):
    """Position ``known − 1`` is the last verified one; the tokens after the bonus are what was proposed."""
    generator = torch.Generator().manual_seed(known)
    ids = torch.randint(0, 61, (LENGTH,), generator=generator)
    aux = torch.randn(LENGTH, 3, 32, generator=generator)
    drafter = Eagle3Drafter(draft, max_draft_tokens=STEPS)
    drafter.extend(ids[: known + 1], {"aux_hidden_states": aux[:known]})
    proposed = drafter.propose(STEPS)
    ids[known + 1 : known + 1 + STEPS] = proposed
    assert unrolled_guesses(draft, ids, aux, known - 1) == proposed.tolist()


def test_a_long_sequence_outgrows_the_first_cache(draft):
    ids, aux = torch.randint(0, 61, (700,)), torch.randn(699, 3, 32)
    pieces, whole = (Eagle3Drafter(draft, max_draft_tokens=3) for _ in range(2))
    for start in range(0, 699, 233):
        pieces.extend(ids[start : start + 234], {"aux_hidden_states": aux[start : start + 233]})
        assert pieces.propose(3).shape == (3,)
    whole.extend(ids, {"aux_hidden_states": aux})
    assert torch.equal(pieces.propose(3), whole.propose(3))


def test_misuse_is_refused(draft):
    drafter = Eagle3Drafter(draft, max_draft_tokens=3)
    with pytest.raises(ValueError, match="extend"):
        drafter.propose(1)
    with pytest.raises(ValueError, match="at least one"):
        drafter.extend(torch.tensor([3]), {"aux_hidden_states": torch.randn(0, 3, 32)})


INFO = TargetInfo("t", "LlamaForCausalLM", 28, 64, 100, "bfloat16", 96, 4, 2, 16, 1e-6, 512)


def test_captured_layers_default_to_low_middle_high():
    assert Eagle3Config().aux_layers(INFO) == (1, 13, 24)


@pytest.mark.parametrize("layers", range(1, 9))
def test_captured_layers_of_small_targets_are_distinct_and_exist(layers):
    chosen = Eagle3Config().aux_layers(replace(INFO, num_layers=layers))
    assert list(chosen) == sorted(set(chosen))
    assert all(0 <= layer < layers for layer in chosen)
