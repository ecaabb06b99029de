# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding with a target alone and with a draft that proposes for it. Stage 7: reads a draft, writes nothing.

Both loops give the same tokens: whatever a draft proposes, only what the target itself would have emitted is kept.
They stop at the first end-of-sequence token (which is emitted) or at ``max_new_tokens``.

One decode pass of the speculative loop: the target processes ``[bonus] + proposed`` at once, proposed tokens are
accepted as far as they are the target's own choice, and the choice after the last accepted one is the next bonus token
(Leviathan et al., arXiv 2211.17192, in the greedy case).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specforge_core.contracts import Drafter, TargetDecoder


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Where decoding ends.

    :param max_new_tokens: emitted at most, the token of the prefill included.
    :param eos_token_ids: any of them ends the output and is part of it.
    """

    max_new_tokens: int
    eos_token_ids: Collection[int] = ()


@dataclass(slots=True)
class DecodeResult:
    """One decoded prompt.

    :param token_ids: everything emitted; the first token is the prefill's.
    :param target_passes: decode passes of the target, the prefill excluded.
    :param proposed: how often each draft position was proposed and its outcome known.
    :param accepted: how often each draft position was accepted.
    """

    token_ids: list[int] = field(default_factory=list)
    target_passes: int = 0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_tokens(self) -> int:
        """Tokens emitted by decode passes: all but the prefill's."""
        return max(len(self.token_ids) - 1, 0)

    def count(self, proposed: int, accepted: int) -> None:
        """Record the outcome of one proposal of ``proposed`` tokens."""
        missing = proposed - len(self.proposed)
        self.proposed.extend([0] * missing)
        self.accepted.extend([0] * missing)
        for position in range(proposed):
            self.proposed[position] += 1
            self.accepted[position] += position < accepted


def plain_decode(decoder: TargetDecoder, prompt_ids: Sequence[int], *, limits: DecodeLimits) -> DecodeResult:
    """Decode greedily with the target alone, one token per pass.

    :param prompt_ids: at least one token.
    :raises ValueError: an empty prompt.
    """
    started = time.perf_counter()
    result = DecodeResult()
    decoder.truncate(0)
    token = _choices(decoder.forward(_as_prompt(prompt_ids)).logits[-1:])[0]
    prefilled = time.perf_counter()
    while not _emit(result, [token], limits):
        token = _choices(decoder.forward(torch.tensor([token])).logits)[0]
        result.target_passes += 1
    return _timed(result, started, prefilled)


def speculative_decode(
    decoder: TargetDecoder,
    drafter: Drafter,
    prompt_ids: Sequence[int],
    *,
    limits: DecodeLimits,
    draft_tokens: int | None = None,
) -> DecodeResult:
    """Decode greedily with a draft; the output is that of :func:`plain_decode`.

    :param decoder: returns the features that the drafter reads.
    :param draft_tokens: proposed per pass at most; default: the drafter's most.
    :raises ValueError: an empty prompt, or a drafter that proposes more than it was asked for.
    """
    most = drafter.max_draft_tokens if draft_tokens is None else min(draft_tokens, drafter.max_draft_tokens)
    started = time.perf_counter()
    result = DecodeResult()
    decoder.truncate(0)
    drafter.reset()
    prompt = _as_prompt(prompt_ids)
    prefill = decoder.forward(prompt)
    bonus = _choices(prefill.logits[-1:])[0]
    length = prompt.shape[0]
    prefilled = time.perf_counter()
    stopped = _emit(result, [bonus], limits)
    if not stopped:
        drafter.extend(torch.cat([prompt, torch.tensor([bonus])]), prefill.features)
    while not stopped:
        # A pass emits one token more than it accepts, so the last one needs no proposal.
        proposal = _propose(drafter, min(most, limits.max_new_tokens - len(result.token_ids) - 1))
        step = decoder.forward(torch.tensor([bonus, *proposal]))
        result.target_passes += 1
        choices = _choices(step.logits)
        accepted = _count_matching(proposal, choices)
        emitted = [*proposal[:accepted], choices[accepted]]
        before = len(result.token_ids)
        stopped = _emit(result, emitted, limits)
        kept = len(result.token_ids) - before
        # Past an end-of-sequence token nobody knows what would have been accepted.
        known = kept if kept <= accepted else len(proposal)
        result.count(known, min(accepted, kept))
        if not stopped:
            length += accepted + 1
            decoder.truncate(length)
            verified = {name: rows[: accepted + 1] for name, rows in step.features.items()}
            drafter.extend(torch.tensor([bonus, *emitted]), verified)
            bonus = emitted[-1]
    return _timed(result, started, prefilled)


def _as_prompt(prompt_ids: Sequence[int]) -> Tensor:
    if not len(prompt_ids):
        raise ValueError("an empty prompt cannot be decoded")
    return torch.tensor(list(prompt_ids), dtype=torch.int64)


def _choices(logits_nV: Tensor) -> list[int]:
    return [int(token) for token in logits_nV.argmax(dim=-1).tolist()]


def _propose(drafter: Drafter, max_tokens: int) -> list[int]:
    if max_tokens < 1:
        return []
    proposal = [int(token) for token in drafter.propose(max_tokens).tolist()]
    if len(proposal) > max_tokens:
        raise ValueError(f"the drafter proposed {len(proposal)} tokens when asked for at most {max_tokens}")
    return proposal


def _count_matching(proposal: Sequence[int], choices: Sequence[int]) -> int:
    for position, token in enumerate(proposal):
        if token != choices[position]:
            return position
    return len(proposal)


def _emit(result: DecodeResult, tokens: Sequence[int], limits: DecodeLimits) -> bool:
    """Append tokens up to the end of the output; True once it is reached."""
    for token in tokens:
        result.token_ids.append(token)
        if token in limits.eos_token_ids or len(result.token_ids) >= limits.max_new_tokens:
            return True
    return False


def _timed(result: DecodeResult, started: float, prefilled: float) -> DecodeResult:
    result.prefill_seconds = prefilled - started
    result.decode_seconds = time.perf_counter() - prefilled
    return result
