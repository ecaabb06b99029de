# SPDX-License-Identifier: Apache-2.0
"""How much the uncorrected guesses count in the loss as training goes on (Domino, arXiv 2605.29707)."""

from __future__ import annotations


def base_loss_weight(step: int, total_steps: int, *, start: float, decay_ratio: float) -> float:
    """λ: falls linearly from ``start`` to zero over the first ``decay_ratio`` of the run, then stays there.

    ``λ = start·(1 − min(step / max(1, int(total_steps·decay_ratio)), 1))``, clipped to [0, 1].

    :param step: finished optimizer steps.
    """
    progress = min(step / max(1, int(total_steps * decay_ratio)), 1.0)
    return min(max(start * (1.0 - progress), 0.0), 1.0)
