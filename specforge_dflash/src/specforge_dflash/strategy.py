# SPDX-License-Identifier: Apache-2.0
"""DFlash as a strategy: what is captured, how anchors are drawn, what one micro-batch costs, how the draft is exported.

:class:`BlockStrategy` is what every block-parallel draft shares; a strategy that builds on DFlash subclasses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    INPUT_IDS,
    LM_HEAD,
    LOSS_MASK,
    Batch,
    CaptureRequest,
    Drafter,
    FrozenSource,
    LossTerm,
    Ratio,
    Sample,
    StepContext,
    StepOutput,
    Strategy,
    TargetInfo,
)
from specforge_core.modeling.export_files import check_captured
from torch import Tensor, nn

from specforge_dflash.anchors import choose_anchors, label_blocks, pad_anchors, slot_weights
from specforge_dflash.config import BlockDraftConfig, DflashConfig
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.drafter import DflashDrafter
from specforge_dflash.export import read_export, write_export
from specforge_dflash.loss import SlotScores, accepted_lengths, dpace_weights
from specforge_dflash.rows import ANCHOR_KEEP, ANCHORS, PackedBlocks

WEIGHTS = "weights"
SAMPLES = "samples"

_Draft = TypeVar("_Draft", bound=DflashDraft)


class BlockStrategy(Strategy):
    """What is the same for every draft that fills blocks: capture, anchors, denominators, accuracy."""

    def __init__(self, config: BlockDraftConfig) -> None:
        self.settings = config

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return self.settings.capture_request(info)

    def collate(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        """Pad on the right with zeros; draw each sample's anchors from its own seed."""

        def pad(name: str) -> Tensor:
            return nn.utils.rnn.pad_sequence([s.features[name] for s in samples], batch_first=True)

        anchors = [
            choose_anchors(sample.features[LOSS_MASK], num_anchors=self.settings.num_anchors, seed=seed)
            for sample, seed in zip(samples, seeds, strict=True)
        ]
        padded, keep = pad_anchors(anchors)
        tensors = {
            INPUT_IDS: pad(INPUT_IDS),
            LOSS_MASK: pad(LOSS_MASK).bool(),
            AUX_HIDDEN_STATES: pad(AUX_HIDDEN_STATES),
            ANCHORS: padded,
            ANCHOR_KEEP: keep,
        }
        num_tokens = sum(sample.num_tokens for sample in samples)
        return Batch(tensors, self.count(tensors), num_samples=len(samples), num_tokens=num_tokens)

    def count(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """The denominators of a collated batch: ``weights`` Σ w δ and ``samples``."""
        settings = self.settings
        labels = label_blocks(
            tensors[INPUT_IDS],
            tensors[LOSS_MASK],
            (tensors[ANCHORS], tensors[ANCHOR_KEEP]),
            block_size=settings.block_size,
            offset=settings.label_offset,
        )
        per_slot = labels.trained_BNK.sum((0, 1)).double()
        return {WEIGHTS: float(per_slot @ self.slot_weights().double()), SAMPLES: float(len(tensors[INPUT_IDS]))}

    def slot_weights(self) -> Tensor:
        """δ of every slot, fp32 [K]."""
        settings = self.settings
        return slot_weights(settings.block_size, gamma=settings.loss_decay_gamma, offset=settings.label_offset)

    def read_captured(self, read: Callable[[], _Draft], directory: Path, *, target: FrozenSource) -> _Draft:
        """The draft of an export that joins as many layers as are captured, with its frozen parts."""

        def read_and_check() -> _Draft:
            draft = read()
            check_captured(draft.shape, self.settings.aux_layers(target.info), directory)
            return draft

        return with_frozen(read_and_check, target)

    def position_accuracy(self, blocks: PackedBlocks | None, correct_E: Tensor | None) -> list[Ratio]:
        """Σ w 1[argmax = label] / Σ w at each position that a drafter proposes."""
        offset, count = self.settings.label_offset, self.settings.num_draft_tokens
        if blocks is None or correct_E is None:
            return [Ratio(0.0, 0.0)] * count
        slots, size = blocks.trained_slots, self.settings.block_size
        counted = torch.bincount(slots, minlength=size)
        correct = torch.bincount(slots[correct_E], minlength=size)
        first = 1 - offset
        table = torch.stack([correct, counted])[:, first : first + count].tolist()
        return [Ratio(float(c), float(n)) for c, n in zip(*table, strict=True)]


class DflashStrategy(BlockStrategy):
    """DFlash with its cross-entropy or a D-PACE loss."""

    def __init__(self, config: DflashConfig) -> None:
        super().__init__(config)
        self.config = config

    def build_draft(self, target: FrozenSource) -> DflashDraft:
        shape = self.config.shape(target.info)
        return with_frozen(lambda: DflashDraft(shape), target)

    def loss(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        assert isinstance(draft, DflashDraft)
        plain = self.config.loss_type == "dflash"
        denominator = WEIGHTS if plain else SAMPLES
        scores: SlotScores | None = draft(batch.tensors)
        if scores is None:
            nothing = Ratio(0.0, 0.0)
            metrics = {"accuracy": nothing, "cross_entropy": nothing, "block_acceptance_length": nothing}
            return StepOutput([LossTerm(denominator, draft.untouched())], self.position_accuracy(None, None), metrics)
        if plain:
            weight_E = self.slot_weights().to(scores.loss_E.device)[scores.blocks.trained_slots]
        else:
            weight_E = dpace_weights(scores, loss_type=self.config.loss_type, alpha=self.config.dpace_alpha)
        accepted = accepted_lengths(scores.blocks, scores.correct_E) + 1
        sums = [scores.correct_E.sum(), scores.loss_E.detach().sum(), accepted.sum()]
        correct, entropy, length = torch.stack([x.double() for x in sums]).tolist()
        counted, blocks = float(scores.loss_E.shape[0]), float(accepted.shape[0])
        metrics = {
            "accuracy": Ratio(correct, counted),
            "cross_entropy": Ratio(entropy, counted),
            "block_acceptance_length": Ratio(length, blocks),
        }
        return StepOutput(
            [LossTerm(denominator, (scores.loss_E * weight_E).sum())],
            self.position_accuracy(scores.blocks, scores.correct_E),
            metrics,
        )

    def drafter(self, draft: nn.Module, target: FrozenSource) -> Drafter:
        assert isinstance(draft, DflashDraft)
        return DflashDrafter(draft, max_draft_tokens=min(self.config.num_draft_tokens, draft.shape.block_size - 1))

    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        assert isinstance(draft, DflashDraft)
        write_export(draft, directory, format=format, target=target, aux_layer_ids=self.config.aux_layers(target))

    def load_export(self, directory: Path, target: FrozenSource) -> DflashDraft:
        return self.read_captured(lambda: read_export(directory, target.info), directory, target=target)


def with_frozen(build: Callable[[], _Draft], target: FrozenSource) -> _Draft:
    """A draft with its frozen parts filled from the target. They are read first: a target whose weights are not what it
    says is refused before a draft of the sizes it says takes memory.

    :raises TargetError: the target's weights have other shapes.
    """
    weights = target.frozen_weights([EMBED_TOKENS, LM_HEAD])
    draft = build()
    draft.embed_tokens.load(weights[EMBED_TOKENS])
    draft.target_head.load(weights[LM_HEAD])
    return draft
