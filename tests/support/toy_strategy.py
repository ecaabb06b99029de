# SPDX-License-Identifier: Apache-2.0
"""A strategy small enough to train in milliseconds, and with everything that makes cutting windows hard.

Two loss terms with different denominators (one of which can be zero), anchors drawn from each sample's seed, padding
that must not count, and a variant whose loss needs a sum over the whole window before the first backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LOSS_MASK,
    Batch,
    CaptureRequest,
    Drafter,
    ExportError,
    FrozenSource,
    LossTerm,
    Ratio,
    Sample,
    StepContext,
    StepOutput,
    Strategy,
    TargetInfo,
)
from torch import Tensor, nn

HIDDEN = 6
VOCABULARY = 11


class ToyDraft(nn.Module):
    """Predicts the next two tokens of every position from its feature."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, 8)
        self.heads = nn.ModuleList([nn.Linear(8, VOCABULARY) for _ in range(2)])
        self.unused = nn.Parameter(torch.ones(3))  # a parameter that no loss reaches
        self.register_buffer("kept", torch.arange(3))

    def forward(self, features: Tensor) -> list[Tensor]:
        inner = torch.tanh(self.inner(features.to(self.inner.weight.dtype)))
        return [head(inner).float() for head in self.heads]


def build_draft(seed: int = 0) -> ToyDraft:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyDraft()


class ToyStrategy(Strategy):
    """Cross-entropy of two future tokens over trained positions, and a squared norm over a few random anchors."""

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return CaptureRequest(aux_layer_ids=(0,))

    def build_draft(self, target: FrozenSource) -> nn.Module:
        return build_draft()

    def collate(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        longest = max(sample.num_tokens for sample in samples)
        features = torch.zeros(len(samples), longest, HIDDEN)
        ids = torch.zeros(len(samples), longest + 2, dtype=torch.int64)
        mask = torch.zeros(len(samples), longest)
        anchors = torch.zeros(len(samples), longest)
        for row, (sample, seed) in enumerate(zip(samples, seeds, strict=True)):
            tokens = sample.num_tokens
            features[row, :tokens] = sample.features[AUX_HIDDEN_STATES][:, 0]
            ids[row, :tokens] = sample.features[INPUT_IDS]
            mask[row, :tokens] = sample.features[LOSS_MASK].float()
            generator = torch.Generator().manual_seed(seed)
            anchors[row, :tokens] = (torch.rand(tokens, generator=generator) < 0.3) * mask[row, :tokens]
        return Batch(
            tensors={"features": features, "ids": ids, "mask": mask, "anchors": anchors},
            denominators={"tokens": float(mask.sum()), "anchors": float(anchors.sum()), "never": 0.0},
            num_samples=len(samples),
            num_tokens=sum(sample.num_tokens for sample in samples),
        )

    def loss(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        tensors = batch.tensors
        mask, anchors = tensors["mask"], tensors["anchors"]
        total = torch.zeros(())
        accuracy = []
        for shift, logits in enumerate(draft(tensors["features"]), start=1):
            labels = tensors["ids"][:, shift : shift + mask.shape[1]]
            entropy = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total = total + (entropy * mask.flatten()).sum()
            correct = ((logits.argmax(-1) == labels) * mask).sum()
            accuracy.append(Ratio(float(correct), float(mask.sum())))
        norms = (draft(tensors["features"])[0].square().mean(-1) * anchors).sum()
        terms = [
            LossTerm("tokens", total, weight=self.token_weight(ctx)),
            LossTerm("anchors", norms, weight=0.1 * (1 - ctx.step / ctx.total_steps)),
            LossTerm("never", norms * math.nan),
        ]
        return StepOutput(terms, accuracy, {"anchor_share": Ratio(float(anchors.sum()), float(mask.sum()))})

    def token_weight(self, ctx: StepContext) -> float:
        return 1.0

    def drafter(self, draft: nn.Module, target: FrozenSource) -> Drafter:
        raise NotImplementedError

    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        raise ExportError("the toy has no export")

    def load_export(self, directory: Path, target: FrozenSource) -> nn.Module:
        raise ExportError("the toy has no export")


class MeasuringToyStrategy(ToyStrategy):
    """Weighs its loss by how well the whole window is predicted before the step."""

    measures = True

    def measure(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> Mapping[str, Ratio]:
        return {"accuracy": super().loss(draft, batch, ctx).position_accuracy[0]}

    def token_weight(self, ctx: StepContext) -> float:
        return math.exp(-(ctx.measured["accuracy"].value or 0.0)) if ctx.measured else 1.0
