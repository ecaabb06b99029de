# SPDX-License-Identifier: Apache-2.0
"""Evaluation on held-out features: counts are summed over the whole set and all ranks before any ratio."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from specforge_core.contracts import Batch, Ratio, StepContext, Strategy, simulated_acceptance_length
from specforge_core.training.parallelism import SingleProcess
from specforge_core.training.reduction import Counts, sum_denominators, sum_measured

if TYPE_CHECKING:
    from torch import nn

    from specforge_core.training.parallelism import Parallelism


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What held-out features say about a draft. Nothing counted gives no metric, never a zero.

    :param loss: None where nothing was counted.
    :param position_accuracy: one ratio per draft position.
    """

    loss: float | None
    position_accuracy: Sequence[Ratio]
    metrics: Mapping[str, Ratio]

    @property
    def simulated_acceptance_length(self) -> float | None:
        return simulated_acceptance_length(self.position_accuracy)

    def values(self) -> dict[str, float]:
        """Every metric that was counted, by name."""
        found = {"loss": self.loss, "simulated_acceptance_length": self.simulated_acceptance_length}
        found |= {f"accuracy_{position}": ratio.value for position, ratio in enumerate(self.position_accuracy)}
        found |= {name: ratio.value for name, ratio in self.metrics.items()}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates a draft on micro-batches.

    Sums that a strategy measures over a window in training are measured over each micro-batch here.
    """

    strategy: Strategy
    device: str
    total_steps: int
    parallelism: Parallelism

    @torch.no_grad()
    def run(self, draft: nn.Module, batches: Iterable[Batch], *, step: int) -> Evaluation:
        """Evaluate after ``step`` finished optimizer steps; this rank's micro-batches in, all ranks' result out.

        The loss of the set is ``Σ_d Σ weight · numerator / Σ d`` over the denominators d. Raises what reading
        ``batches`` raises.
        """
        counts = Counts()
        numerators: dict[str, float] = {}
        denominators: dict[str, float] = {}
        training = draft.training
        draft.eval()
        try:
            for held in batches:
                batch = held.to(self.device)
                output = self.strategy.loss(draft, batch, self._context(draft, batch, step))
                for term in output.terms:
                    weighted = term.weight * float(term.numerator)
                    numerators[term.denominator] = numerators.get(term.denominator, 0.0) + weighted
                for name, count in batch.denominators.items():
                    denominators[name] = denominators.get(name, 0.0) + count
                counts.add(output, loss=0.0)
        finally:
            draft.train(training)
        total = counts.over_ranks(self.parallelism)
        numerators = self.parallelism.sum_counts(numerators)
        denominators = self.parallelism.sum_counts(denominators)
        losses = [value / denominators[name] for name, value in numerators.items() if denominators[name]]
        return Evaluation(
            loss=sum(losses) if losses else None,
            position_accuracy=total.position_accuracy,
            metrics=total.metrics,
        )

    def _context(self, draft: nn.Module, batch: Batch, step: int) -> StepContext:
        alone = SingleProcess()
        denominators = sum_denominators([batch], alone)
        ctx = StepContext(step=step, total_steps=self.total_steps, denominators=denominators)
        if not self.strategy.measures:
            return ctx
        return sum_measured(self.strategy, draft, [batch], ctx=ctx, parallelism=alone)
