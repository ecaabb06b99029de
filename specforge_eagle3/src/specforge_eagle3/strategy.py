# SPDX-License-Identifier: Apache-2.0
"""EAGLE3 as a strategy: what is captured, what one micro-batch costs, how the draft is built and exported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    FINAL_NORM,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LM_HEAD,
    LOSS_MASK,
    Batch,
    CaptureRequest,
    Drafter,
    FrozenSource,
    LossTerm,
    Norm,
    Ratio,
    Sample,
    StepContext,
    StepOutput,
    Strategy,
    TargetInfo,
)
from specforge_core.modeling import VocabMap
from specforge_core.modeling.export_files import check_captured
from torch import Tensor, nn

from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.draft_model import Eagle3Draft
from specforge_eagle3.drafter import Eagle3Drafter
from specforge_eagle3.export import read_export, write_export
from specforge_eagle3.loss import StepWeights, UnrollSums, count_in_vocabulary
from specforge_eagle3.unroll import labels_at

_TINY = 1e-8


class Eagle3Strategy(Strategy):
    """EAGLE-3 with its KL loss or an LK loss (alpha, lambda)."""

    def __init__(self, config: Eagle3Config) -> None:
        self.config = config
        # The LK losses divide by acceptance sums of the whole window, which only a pass over it can give.
        self.measures = config.lk_loss_type != "none"

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return self.config.capture_request(info)

    def build_draft(self, target: FrozenSource) -> Eagle3Draft:
        shape = self.config.shape(target.info)
        if shape.draft_vocab_size < shape.vocab_size:
            vocabulary = VocabMap.from_counts(target.token_counts(), shape.draft_vocab_size)
        else:
            vocabulary = VocabMap.full(shape.vocab_size)
        return with_frozen(lambda: Eagle3Draft(shape, vocabulary), target, last_hidden_norm=shape.last_hidden_norm)

    def collate(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        """Pad on the right with zeros. Nothing here is random, so ``seeds`` go unused."""

        def pad(name: str) -> Tensor:
            return nn.utils.rnn.pad_sequence([s.features[name] for s in samples], batch_first=True)

        tensors = {
            INPUT_IDS: pad(INPUT_IDS),
            LOSS_MASK: pad(LOSS_MASK).bool(),
            AUX_HIDDEN_STATES: pad(AUX_HIDDEN_STATES),
            LAST_HIDDEN_STATES: pad(LAST_HIDDEN_STATES),
        }
        num_tokens = sum(s.num_tokens for s in samples)
        # Positions are counted without padding, so that they do not depend on how a window is cut.
        denominators = {
            "tokens": float(tensors[LOSS_MASK].sum()),
            "positions": float(num_tokens),
            "samples": float(len(samples)),
        }
        return Batch(tensors, denominators, num_samples=len(samples), num_tokens=num_tokens)

    def measure(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> Mapping[str, Ratio]:
        steps = self.config.ttt_steps
        if self.config.lk_loss_type == "alpha":
            return {f"counted_{k}": Ratio(n, 1.0) for k, n in enumerate(self._count(draft, batch))}
        sums: UnrollSums = draft(batch.tensors, steps=steps, weights=_zeros(steps))
        alpha, counted = sums.alpha.tolist(), sums.counted.tolist()
        return {f"alpha_{k}": Ratio(alpha[k], counted[k]) for k in range(steps)}

    def loss(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        weights, constant = self._weights(ctx)
        sums: UnrollSums = draft(batch.tensors, steps=self.config.ttt_steps, weights=weights)
        numerator = sums.numerator
        if constant:  # no row carries it, so each micro-batch adds its share by positions
            share = batch.denominators["positions"] / ctx.denominators["positions"]
            numerator = numerator + constant * share * ctx.denominators[self.config.loss_normalizer]
        return StepOutput([LossTerm(self.config.loss_normalizer, numerator)], *_metrics(sums))

    def _count(self, draft: nn.Module, batch: Batch) -> list[float]:
        """Σ pm of every step over one micro-batch."""
        assert isinstance(draft, Eagle3Draft)
        mask = batch.tensors[LOSS_MASK]
        trained_M = mask.flatten().nonzero().flatten()
        back = torch.arange(self.config.ttt_steps, device=mask.device).unsqueeze(1)
        labels = labels_at(draft, batch.tensors[LAST_HIDDEN_STATES], trained_M)
        return count_in_vocabulary(labels, (trained_M % mask.shape[1]) >= back).tolist()

    def _weights(self, ctx: StepContext) -> tuple[StepWeights, float]:
        """Coefficients of the sums in the numerator, and the part of the window's loss that no row carries.

        The trainer divides the numerator by the window's ``loss_normalizer`` count D; the acceptance terms of the LK
        losses divide by their own counts instead, so D is multiplied back into their coefficients.
        """
        config, steps = self.config, range(self.config.ttt_steps)
        decay = [config.step_decay**k for k in steps]
        nothing = (0.0,) * len(steps)
        if config.lk_loss_type == "none":
            return StepWeights(tuple(decay), nothing, nothing), 0.0
        divisor = ctx.denominators[config.loss_normalizer]
        if config.lk_loss_type == "alpha":
            counted = [max(ctx.measured[f"counted_{k}"].numerator, _TINY) for k in steps]
            return StepWeights(nothing, nothing, tuple(-decay[k] * divisor / counted[k] for k in steps)), 0.0
        kl, alpha, constant = [], [], 0.0
        for k in steps:
            measured = ctx.measured[f"alpha_{k}"]
            counted_k = max(measured.denominator, _TINY)
            weight = config.kl_scale * math.exp(-config.kl_decay * measured.numerator / counted_k)
            kl.append(decay[k] * weight)
            alpha.append(-decay[k] * (1 - weight) * divisor / counted_k)
            constant += decay[k] * (1 - weight)
        return StepWeights(tuple(kl), tuple(alpha), nothing), constant

    def drafter(self, draft: nn.Module, target: FrozenSource) -> Drafter:
        assert isinstance(draft, Eagle3Draft)
        return Eagle3Drafter(draft, max_draft_tokens=self.config.num_draft_tokens)

    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        assert isinstance(draft, Eagle3Draft)
        write_export(
            draft,
            directory,
            format=format,
            target=target,
            aux_layer_ids=self.config.aux_layers(target),
            draft_tokens=self.config.num_draft_tokens,
        )

    def load_export(self, directory: Path, target: FrozenSource) -> Eagle3Draft:
        info, norm = target.info, self.config.last_hidden_norm

        def read() -> Eagle3Draft:
            draft = read_export(directory, info, last_hidden_norm=norm)
            check_captured(draft.shape, self.config.aux_layers(info), directory)
            return draft

        return with_frozen(read, target, last_hidden_norm=norm)


def with_frozen(build: Callable[[], Eagle3Draft], target: FrozenSource, *, last_hidden_norm: Norm) -> Eagle3Draft:
    """A draft with its frozen parts filled from the target. They are read first: a target whose weights are not what it
    says is refused before a draft of the sizes it says takes memory.

    :raises TargetError: the target's weights have other shapes.
    """
    names = [EMBED_TOKENS, LM_HEAD, *([FINAL_NORM] if last_hidden_norm == "pre" else [])]
    weights = target.frozen_weights(names)
    draft = build()
    draft.embed_tokens.load(weights[EMBED_TOKENS])
    draft.target_head.load(weights[LM_HEAD], weights.get(FINAL_NORM))
    return draft


def _zeros(steps: int) -> StepWeights:
    nothing = (0.0,) * steps
    return StepWeights(nothing, nothing, nothing)


def _metrics(sums: UnrollSums) -> tuple[list[Ratio], dict[str, Ratio]]:
    table = torch.stack([sums.correct, sums.trained, sums.alpha, sums.kl, sums.counted]).tolist()
    correct, trained, alpha, kl, counted = table
    accuracy = [Ratio(c, t) for c, t in zip(correct, trained, strict=True)]
    metrics = {f"acceptance_rate_{k}": Ratio(a, n) for k, (a, n) in enumerate(zip(alpha, counted, strict=True))}
    metrics["kl"] = Ratio(sum(kl), sum(counted))
    return accuracy, metrics
