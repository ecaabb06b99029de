# SPDX-License-Identifier: Apache-2.0
"""Domino as a strategy: DFlash's capture, anchors and denominators; two losses whose balance shifts over the run."""

from __future__ import annotations

from pathlib import Path

import torch
from specforge_core.contracts import Batch, Drafter, FrozenSource, LossTerm, Ratio, StepContext, StepOutput, TargetInfo
from specforge_dflash.loss import accepted_lengths
from specforge_dflash.strategy import WEIGHTS, BlockStrategy, with_frozen
from torch import Tensor, nn

from specforge_domino.base_loss_decay import base_loss_weight
from specforge_domino.config import DominoConfig
from specforge_domino.draft_model import DominoDraft
from specforge_domino.drafter import DominoDrafter
from specforge_domino.export import read_export, write_export
from specforge_domino.loss import CorrectedScores


class DominoStrategy(BlockStrategy):
    """Domino: ``(1 − λ)`` times the corrected cross-entropy plus ``λ`` times the draft's own."""

    def __init__(self, config: DominoConfig) -> None:
        super().__init__(config)
        self.config = config

    def build_draft(self, target: FrozenSource) -> DominoDraft:
        shape, head = self.config.shape(target.info), self.config.head_shape()
        return with_frozen(lambda: DominoDraft(shape, head), target)

    def loss(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        assert isinstance(draft, DominoDraft)
        config, slot_weights_K = self.config, self.slot_weights()
        share = base_loss_weight(
            ctx.step, ctx.total_steps, start=config.lambda_base_start, decay_ratio=config.lambda_base_decay_ratio
        )
        scores: CorrectedScores | None = draft(batch.tensors, slot_weights_K=slot_weights_K, base_share=share)
        if scores is None:
            metrics = {name: Ratio(0.0, 0.0) for name in _METRICS}
            return StepOutput([LossTerm(WEIGHTS, draft.untouched())], self.position_accuracy(None, None), metrics)
        return StepOutput(
            [LossTerm(WEIGHTS, scores.numerator)],
            self.position_accuracy(scores.blocks, scores.final_correct_E),
            _measure(scores, slot_weights_K),
        )

    def drafter(self, draft: nn.Module, target: FrozenSource) -> Drafter:
        assert isinstance(draft, DominoDraft)
        longest = draft.shape.block_size - 1 + draft.head_shape.label_offset
        return DominoDrafter(draft, max_draft_tokens=min(self.config.num_draft_tokens, longest))

    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        assert isinstance(draft, DominoDraft)
        write_export(draft, directory, format=format, target=target, aux_layer_ids=self.config.aux_layers(target))

    def load_export(self, directory: Path, target: FrozenSource) -> DominoDraft:
        return self.read_captured(lambda: read_export(directory, target.info), directory, target=target)


_METRICS = (
    "accuracy",
    "base_accuracy",
    "final_loss",
    "base_loss",
    "block_acceptance_length",
    "base_block_acceptance_length",
)


def _measure(scores: CorrectedScores, slot_weights_K: Tensor) -> dict[str, Ratio]:
    blocks = scores.blocks
    weight_E = slot_weights_K.to(scores.final_E.device)[blocks.trained_slots]
    lengths = [accepted_lengths(blocks, correct) + 1 for correct in (scores.final_correct_E, scores.base_correct_E)]
    sums = [
        scores.final_correct_E.sum(),
        scores.base_correct_E.sum(),
        (scores.final_E * weight_E).sum(),
        (scores.base_E * weight_E).sum(),
        *(length.sum() for length in lengths),
        weight_E.sum(),
    ]
    *numerators, weight = torch.stack([value.double() for value in sums]).tolist()
    counted, whole = float(weight_E.shape[0]), float(lengths[0].shape[0])
    denominators = (counted, counted, weight, weight, whole, whole)
    ratios = (Ratio(n, d) for n, d in zip(numerators, denominators, strict=True))
    return dict(zip(_METRICS, ratios, strict=True))
