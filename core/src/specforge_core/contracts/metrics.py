# SPDX-License-Identifier: Apache-2.0
"""Ratios: how every loss term and metric travels until the moment it is shown.

Averages of averages are wrong; sums of numerators over sums of denominators are not. Everything that is averaged
over tokens or samples is kept as a :class:`Ratio`, added across micro-batches and ranks, and divided once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """A numerator and a denominator that are summed separately."""

    numerator: float
    denominator: float

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)

    @property
    def value(self) -> float | None:
        """The quotient, or None where nothing was counted: no metric rather than a zero."""
        return self.numerator / self.denominator if self.denominator else None


def sum_ratios(parts: Iterable[Mapping[str, Ratio]]) -> dict[str, Ratio]:
    """Add mappings of ratios name by name."""
    total: dict[str, Ratio] = {}
    for part in parts:
        for name, ratio in part.items():
            total[name] = total[name] + ratio if name in total else ratio
    return total


def simulated_acceptance_length(position_accuracy: Sequence[Ratio]) -> float | None:
    """τ as a chain of position accuracies predicts it: ``1 + Σ_k Π_{j≤k} a_j``, bonus token included.

    :param position_accuracy: one ratio per draft position, summed over the whole evaluation set.
    :returns: None where the first position counted nothing.
    """
    if not position_accuracy or position_accuracy[0].value is None:
        return None
    length, survival = 1.0, 1.0
    for ratio in position_accuracy:
        survival *= ratio.value or 0.0
        length += survival
    return length
