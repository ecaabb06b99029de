# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding emits exactly what plain decoding emits, whatever the draft proposes."""

from __future__ import annotations

import pytest
import torch
from specforge_core.decoding.speculative import DecodeLimits, plain_decode, speculative_decode
from toy_decoding import CountingTarget, EmptyDrafter, ScriptedDrafter

PROMPT = [3, 1, 4]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("right_until", [0, 1, 2, 4])
@pytest.mark.parametrize("eos", [(), (7,)])
def test_output_is_the_targets_own(max_new_tokens, right_until, eos):
    limits = DecodeLimits(max_new_tokens=max_new_tokens, eos_token_ids=eos)
    plain = plain_decode(CountingTarget(), PROMPT, limits=limits)
    drafter = ScriptedDrafter(right_until=right_until)
    speculative = speculative_decode(CountingTarget(), drafter, PROMPT, limits=limits)
    assert speculative.token_ids == plain.token_ids
    assert len(plain.token_ids) <= max_new_tokens
    assert plain.target_passes == plain.decode_tokens


def test_oracle_is_accepted_whole():
    limits = DecodeLimits(max_new_tokens=11)
    result = speculative_decode(CountingTarget(), ScriptedDrafter(right_until=4), PROMPT, limits=limits)
    assert result.decode_tokens == 10
    assert result.target_passes == 2
    assert result.proposed == result.accepted == [2, 2, 2, 2]


def test_wrong_drafter_costs_one_pass_per_token():
    limits = DecodeLimits(max_new_tokens=9)
    result = speculative_decode(CountingTarget(), ScriptedDrafter(right_until=0), PROMPT, limits=limits)
    assert result.decode_tokens / result.target_passes == 1.0
    assert sum(result.accepted) == 0
    assert result.proposed[0] == 7  # the last pass has room for its bonus token only


def test_drafter_that_is_half_right():
    limits = DecodeLimits(max_new_tokens=13)
    result = speculative_decode(CountingTarget(), ScriptedDrafter(right_until=2), PROMPT, limits=limits)
    assert result.target_passes == 4
    assert result.accepted == [4, 4, 0, 0]
    assert result.decode_tokens / result.target_passes == 3.0


def test_eos_inside_an_accepted_run_ends_the_output():
    limits = DecodeLimits(max_new_tokens=50, eos_token_ids=(7,))
    result = speculative_decode(CountingTarget(), ScriptedDrafter(right_until=4), PROMPT, limits=limits)
    assert result.token_ids == [5, 6, 7]
    assert result.target_passes == 1
    assert result.proposed == result.accepted == [1, 1]  # what stood after the end is counted nowhere


def test_prefill_that_emits_eos_needs_no_decode_pass():
    limits = DecodeLimits(max_new_tokens=50, eos_token_ids=(5,))
    result = speculative_decode(CountingTarget(), ScriptedDrafter(right_until=4), PROMPT, limits=limits)
    assert result.token_ids == [5]
    assert result.target_passes == 0


def test_drafter_that_proposes_nothing_is_plain_decoding():
    limits = DecodeLimits(max_new_tokens=5)
    result = speculative_decode(CountingTarget(), EmptyDrafter(), PROMPT, limits=limits)
    assert result.token_ids == [5, 6, 7, 8, 9]
    assert result.target_passes == 4
    assert result.proposed == []


def test_fewer_draft_tokens_can_be_asked_for():
    limits = DecodeLimits(max_new_tokens=9)
    drafter = ScriptedDrafter(right_until=4)
    result = speculative_decode(CountingTarget(), drafter, PROMPT, limits=limits, draft_tokens=1)
    assert len(result.proposed) == 1
    assert result.target_passes == 4


def test_drafter_sees_every_verified_position_once_with_its_feature():
    drafter = ScriptedDrafter(right_until=2)
    target = CountingTarget()
    result = speculative_decode(target, drafter, PROMPT, limits=DecodeLimits(max_new_tokens=10))
    sequence = PROMPT + result.token_ids
    assert drafter.seen_tokens == sequence[: len(drafter.seen_tokens)]
    assert drafter.seen_features == [float(token) for token in drafter.seen_tokens]


def test_a_decoder_is_reused_for_the_next_prompt():
    target, drafter = CountingTarget(), ScriptedDrafter(right_until=4)
    limits = DecodeLimits(max_new_tokens=6)
    first = speculative_decode(target, drafter, PROMPT, limits=limits).token_ids
    speculative_decode(target, drafter, [9, 9], limits=limits)
    assert speculative_decode(target, drafter, PROMPT, limits=limits).token_ids == first


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        plain_decode(CountingTarget(), [], limits=DecodeLimits(max_new_tokens=3))


def test_drafter_that_proposes_too_much_is_refused():
    class Greedy(ScriptedDrafter):
        def propose(self, max_tokens: int) -> torch.Tensor:
            return torch.zeros(max_tokens + 1, dtype=torch.int64)

    with pytest.raises(ValueError, match="proposed"):
        speculative_decode(
            CountingTarget(), Greedy(right_until=0), PROMPT, limits=DecodeLimits(max_new_tokens=9), draft_tokens=2
        )
