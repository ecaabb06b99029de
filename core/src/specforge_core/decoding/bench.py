# SPDX-License-Identifier: Apache-2.0
"""The bench: speculative against plain greedy decoding of the same target, prompt by prompt. Stage 7.

Both sides decode every prompt in turn, in alternating order, so that a machine that gets slower or faster meanwhile
does so for both. Outputs are compared token by token; one difference makes the bench lossy, which the caller turns
into a failure with :meth:`~specforge_core.decoding.bench_result.BenchResult.raise_if_lossy` once results are written.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specforge_core.contracts import DataError, Drafter, Progress, Prompt, TargetDecoder
from specforge_core.decoding.bench_result import BenchResult, Difference, PromptOutcome
from specforge_core.decoding.speculative import DecodeLimits, DecodeResult, plain_decode, speculative_decode

if TYPE_CHECKING:
    from specforge_core.config.run_config import BenchSection


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSides:
    """What is compared.

    :param plain: a decoder of the target that captures nothing.
    :param speculative: a decoder of the same target with the features that the drafter reads.
    """

    plain: TargetDecoder
    speculative: TargetDecoder
    drafter: Drafter


def cut_prompts(prompts: Sequence[Prompt], settings: BenchSection) -> list[Prompt]:
    """The part of each prompt that is given; the rest is decoded.

    :returns: at most ``settings.prompts``, without those of which nothing is left.
    :raises DataError: nothing is left of any prompt.
    """
    cut: list[Prompt] = []
    for prompt in prompts:
        length = settings.prompt_tokens
        if length is None:
            length = list(prompt.loss_mask).index(1) if 1 in prompt.loss_mask else len(prompt.input_ids)
        if length and len(cut) < settings.prompts:
            cut.append(Prompt(prompt.prompt_id, list(prompt.input_ids[:length]), list(prompt.loss_mask[:length])))
    if not cut:
        raise DataError(
            "no prompt has a token before its first trained one, so there is nothing to decode from",
            where="data.eval",
            hint="set bench.prompt_tokens, or give held-out prompts",
        )
    return cut


def run_bench(
    prompts: Sequence[Prompt],
    *,
    sides: BenchSides,
    limits: DecodeLimits,
    draft_tokens: int | None,
    facts: Mapping[str, str | int],
    progress: Progress,
) -> BenchResult:
    """Decode every prompt on both sides and compare.

    :param prompts: decoded from as they stand (see :func:`cut_prompts`); the first is also decoded once beforehand on
        both sides, uncounted, to warm up.
    :param draft_tokens: proposed per target pass; default: the drafter's most.
    :param facts: of the run (target, dtype, strategy); the machine's are added.
    :raises DataError: no prompts.
    """
    if not prompts:
        raise DataError("no prompts to decode", where="bench")
    most = sides.drafter.max_draft_tokens
    used = most if draft_tokens is None else min(draft_tokens, most)
    progress.begin("bench", len(prompts))
    _decode_both(prompts[0], sides, limits, used, plain_first=True)
    outcomes = []
    for index, prompt in enumerate(prompts):
        plain, speculative = _decode_both(prompt, sides, limits, used, plain_first=index % 2 == 0)
        outcome = PromptOutcome(
            prompt_id=prompt.prompt_id,
            prompt_tokens=prompt.num_tokens,
            plain=plain,
            speculative=speculative,
            difference=find_difference(plain.token_ids, speculative.token_ids),
        )
        outcomes.append(outcome)
        if speculative.target_passes:
            progress.advance(1, acceptance_length=speculative.decode_tokens / speculative.target_passes)
        else:
            progress.advance(1)
    return BenchResult(
        outcomes=tuple(outcomes),
        draft_tokens=used,
        max_new_tokens=limits.max_new_tokens,
        facts={**facts, **describe_machine()},
    )


def _decode_both(
    prompt: Prompt, sides: BenchSides, limits: DecodeLimits, draft_tokens: int, *, plain_first: bool
) -> tuple[DecodeResult, DecodeResult]:
    def decode_plain() -> DecodeResult:
        return plain_decode(sides.plain, prompt.input_ids, limits=limits)

    def decode_speculative() -> DecodeResult:
        return speculative_decode(
            sides.speculative, sides.drafter, prompt.input_ids, limits=limits, draft_tokens=draft_tokens
        )

    if plain_first:
        plain = decode_plain()
        return plain, decode_speculative()
    speculative = decode_speculative()
    return decode_plain(), speculative


def find_difference(plain: Sequence[int], speculative: Sequence[int]) -> Difference | None:
    """The first emitted position at which two outputs differ; a missing token counts as -1."""
    for position in range(max(len(plain), len(speculative))):
        left = plain[position] if position < len(plain) else -1
        right = speculative[position] if position < len(speculative) else -1
        if left != right:
            return Difference(position=position, plain_token=left, speculative_token=right)
    return None


def describe_machine() -> dict[str, str | int]:
    """What the speed was measured on."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
