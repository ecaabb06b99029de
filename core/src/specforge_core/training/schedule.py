# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each optimizer step: linear warm-up, then a cosine to zero, clamped there."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A pure function of the finished optimizer steps, so that a resumed run goes on where it stood.

    :param warmup_ratio: share of ``total_steps`` that warms up (rounded down).
    """

    peak: float
    warmup_ratio: float
    total_steps: int

    def learning_rate(self, step: int) -> float:
        """The rate of the update that follows ``step`` finished ones."""
        warmup = int(self.total_steps * self.warmup_ratio)
        if step < warmup:
            return self.peak * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
