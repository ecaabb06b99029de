# SPDX-License-Identifier: Apache-2.0
"""One optimizer step over one window.

Denominators come from masks, so they are summed over the whole window and all ranks before the first backward. Every
micro-batch then contributes ``Σ weight · numerator / global denominator``, gradients are summed, and the step is the
same however the window was cut (to rounding).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from specforge_core.contracts import Batch, LossTerm, Ratio, SampleRef, SpecForgeError, StepContext, Strategy
from specforge_core.training.reduction import Counts, sum_denominators, sum_measured

if TYPE_CHECKING:
    from specforge_core.training.optimizer import DraftOptimizer
    from specforge_core.training.parallelism import Parallelism
    from specforge_core.training.schedule import Schedule

_NAMED_SAMPLES = 32
"""Of a window in an error: most windows whole, and a large one on one screen."""


class TrainingWindow(Protocol):
    """What a window must tell; the loader's windows do."""

    @property
    def index(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def micro_batches(self) -> Sequence[Batch]: ...
    @property
    def refs(self) -> Sequence[SampleRef]: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def waited_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """What one optimizer step was.

    :param step: finished optimizer steps, this one included.
    :param grad_norm: of the whole gradient, before clipping.
    :param num_tokens: tokens of the whole window over all ranks; ``seconds`` without the wait for it.
    :param metrics: the strategy's, summed over the window and all ranks.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    seconds: float
    waited_seconds: float
    position_accuracy: Sequence[Ratio]
    metrics: Mapping[str, Ratio]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStep:
    """Forward, backward, clip, update."""

    strategy: Strategy
    draft: nn.Module
    optimizer: DraftOptimizer
    schedule: Schedule
    parallelism: Parallelism
    max_grad_norm: float
    device: str

    def run(self, window: TrainingWindow) -> WindowResult:
        """Train one window.

        :raises SpecForgeError: loss or gradient is not finite; the draft is as it was before this window.
        """
        began = time.perf_counter()
        self.draft.train()
        self.optimizer.clear_gradients()
        ctx = self._context(window)
        counts = Counts()
        for batch in window.micro_batches:
            output = self.strategy.loss(self.draft, batch.to(self.device), ctx)
            loss = weigh(output.terms, ctx.denominators)
            if loss is not None and loss.requires_grad:
                loss.backward()
            counts.add(output, loss=0.0 if loss is None else float(loss.detach()))
        total = counts.over_ranks(self.parallelism)
        gradients = self.optimizer.gradients()
        self.parallelism.sum_gradients(gradients)
        grad_norm = self._clip(gradients, window, loss=total.loss)
        learning_rate = self.schedule.learning_rate(window.index)
        self.optimizer.step(learning_rate)
        return WindowResult(
            step=window.index + 1,
            epoch=window.epoch,
            loss=total.loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            num_tokens=window.num_tokens,
            seconds=time.perf_counter() - began,
            waited_seconds=window.waited_seconds,
            position_accuracy=total.position_accuracy,
            metrics=total.metrics,
        )

    def _context(self, window: TrainingWindow) -> StepContext:
        denominators = sum_denominators(window.micro_batches, self.parallelism)
        ctx = StepContext(step=window.index, total_steps=self.schedule.total_steps, denominators=denominators)
        if not self.strategy.measures:
            return ctx
        batches = (batch.to(self.device) for batch in window.micro_batches)
        return sum_measured(self.strategy, self.draft, batches, ctx=ctx, parallelism=self.parallelism)

    def _clip(self, gradients: list[Tensor], window: TrainingWindow, *, loss: float) -> float:
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        grad_norm = float(norm)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            samples = ", ".join(ref.sample_id for ref in window.refs[:_NAMED_SAMPLES])
            if len(window.refs) > _NAMED_SAMPLES:
                samples += f" and {len(window.refs) - _NAMED_SAMPLES} more"
            raise SpecForgeError(
                f"the loss ({loss:g}) or its gradient (norm {grad_norm:g}) is not finite in optimizer step "
                f"{window.index + 1}; the draft was not updated",
                where=f"samples {samples}",
                hint="look at these samples' features, lower training.learning_rate, or train in float32",
            )
        if grad_norm > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / grad_norm)
        return grad_norm


def weigh(terms: Sequence[LossTerm], denominators: Mapping[str, float]) -> Tensor | None:
    """``Σ weight · numerator / denominator``; a term whose denominator is zero trains nothing and is left out."""
    parts = [
        term.numerator * (term.weight / denominators[term.denominator])
        for term in terms
        if denominators[term.denominator]
    ]
    return torch.stack(parts).sum() if parts else None
