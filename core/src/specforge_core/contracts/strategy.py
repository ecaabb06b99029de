# SPDX-License-Identifier: Apache-2.0
"""Strategies: what is captured, what the draft is, how it is trained, how it drafts and how it is exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts.decoding import Drafter
from specforge_core.contracts.metrics import Ratio
from specforge_core.contracts.records import Batch, CaptureRequest, Sample, TargetInfo
from specforge_core.contracts.target_engine import FrozenSource

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where training stands while one micro-batch is computed.

    :param step: finished optimizer steps.
    :param total_steps: optimizer steps of the whole run.
    :param denominators: the window's sums, over all micro-batches and ranks, of ``Batch.denominators``.
    :param measured: the window's sums of what ``Strategy.measure`` returned; empty where it is not used.
    """

    step: int
    total_steps: int
    denominators: Mapping[str, float]
    measured: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One summand of the loss: ``weight · numerator / denominators[denominator]``, the denominator being the window's.

    :param denominator: a name in ``Batch.denominators``.
    :param numerator: a sum over this micro-batch (never an average), scalar, with gradient.
    """

    denominator: str
    numerator: Tensor
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What ``Strategy.loss`` returns for one micro-batch.

    :param terms: summands of the loss.
    :param position_accuracy: correct / counted at each draft position; the simulated acceptance length comes from them.
    :param metrics: anything else worth watching.
    """

    terms: Sequence[LossTerm]
    position_accuracy: Sequence[Ratio] = ()
    metrics: Mapping[str, Ratio] = field(default_factory=dict)


class Strategy(ABC):
    """One way of training a draft. Constructed with its own configuration; holds no training state."""

    measures = False
    """True where ``loss`` needs sums over the whole window that only a forward pass can give (see ``measure``)."""

    @abstractmethod
    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        """What must be captured of this target. The same as the configuration's, which ``plan`` asks."""

    @abstractmethod
    def build_draft(self, target: FrozenSource) -> nn.Module:
        """A new draft with initialised parameters (fp32), seeded by the caller through torch's global generator.

        Trained parameters and persistent buffers make up its checkpoint. What belongs to the target (embedding, head)
        is a non-persistent buffer or a parameter without gradient that ``state_dict`` leaves out.

        :raises DataError: the training data lack something the draft needs.
        """

    @abstractmethod
    def collate(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        """Pad samples into a micro-batch. What is random about a sample comes from its seed, never from its place."""

    def measure(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> Mapping[str, Ratio]:
        """Window-wide sums that ``loss`` needs beforehand; called without gradient on every micro-batch first.

        Only called where ``measures`` is true. ``ctx.measured`` of ``loss`` then holds the window's sums.
        """
        return {}

    @abstractmethod
    def loss(self, draft: nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        """Forward one micro-batch. Under ``torch.no_grad`` it evaluates."""

    @abstractmethod
    def drafter(self, draft: nn.Module, target: FrozenSource) -> Drafter:
        """A drafter over this draft for real decoding."""

    @abstractmethod
    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        """Write what a server loads into an existing empty directory.

        :raises ExportError: a format this strategy does not write.
        """

    @abstractmethod
    def load_export(self, directory: Path, target: FrozenSource) -> nn.Module:
        """Read an export back into a draft equal to the one that was written.

        :raises ExportError: files missing, weights missing or of another shape, another target's vocabulary.
        """
