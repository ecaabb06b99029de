# SPDX-License-Identifier: Apache-2.0
"""Sums over micro-batches and ranks: counts are added first and divided last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from specforge_core.contracts import Batch, Ratio, StepContext, StepOutput, Strategy, sum_ratios

if TYPE_CHECKING:
    from torch import nn

    from specforge_core.training.parallelism import Parallelism


class Counts:
    """A loss, position accuracies and metrics that are being summed."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.position_accuracy: list[Ratio] = []
        self.metrics: dict[str, Ratio] = {}

    def add(self, output: StepOutput, *, loss: float) -> None:
        """Add one micro-batch and its share of the loss."""
        self.loss += loss
        missing = len(output.position_accuracy) - len(self.position_accuracy)
        self.position_accuracy += [Ratio(0.0, 0.0)] * missing
        for position, ratio in enumerate(output.position_accuracy):
            self.position_accuracy[position] += ratio
        self.metrics = sum_ratios([self.metrics, output.metrics])

    def over_ranks(self, parallelism: Parallelism) -> Counts:
        """The sum over all ranks, the same on each."""
        positions = {f"{position}": ratio for position, ratio in enumerate(self.position_accuracy)}
        flat = {"loss": self.loss} | _flatten("position", positions) | _flatten("metric", self.metrics)
        summed = parallelism.sum_counts(flat)
        total = Counts()
        total.loss = summed["loss"]
        by_position = _unflatten("position", summed)
        total.position_accuracy = [by_position[str(position)] for position in range(len(by_position))]
        total.metrics = _unflatten("metric", summed)
        return total


def sum_denominators(batches: Sequence[Batch], parallelism: Parallelism) -> dict[str, float]:
    """``Batch.denominators`` over micro-batches and ranks."""
    mine: dict[str, float] = {}
    for batch in batches:
        for name, count in batch.denominators.items():
            mine[name] = mine.get(name, 0.0) + count
    return parallelism.sum_counts(mine)


def sum_measured(
    strategy: Strategy, draft: nn.Module, batches: Iterable[Batch], *, ctx: StepContext, parallelism: Parallelism
) -> StepContext:
    """``ctx`` with the sums of ``Strategy.measure`` over micro-batches and ranks; a pass without gradient."""
    with torch.no_grad():
        mine = sum_ratios(strategy.measure(draft, batch, ctx) for batch in batches)
    summed = parallelism.sum_counts(_flatten("measured", mine))
    return replace(ctx, measured=_unflatten("measured", summed))


def _flatten(kind: str, ratios: dict[str, Ratio]) -> dict[str, float]:
    numerators = {f"{kind}:numerator:{name}": ratio.numerator for name, ratio in ratios.items()}
    return numerators | {f"{kind}:denominator:{name}": ratio.denominator for name, ratio in ratios.items()}


def _unflatten(kind: str, counts: dict[str, float]) -> dict[str, Ratio]:
    prefix = f"{kind}:numerator:"
    names = [key.removeprefix(prefix) for key in counts if key.startswith(prefix)]
    return {name: Ratio(counts[prefix + name], counts[f"{kind}:denominator:{name}"]) for name in names}
