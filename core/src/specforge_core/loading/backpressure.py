# SPDX-License-Identifier: Apache-2.0
"""How far capture may run ahead of training: a pure state machine. Clock, thread and channel are others' affair.

It pauses where the next batch would go over a high watermark and goes on below a low one, so that the two halves do not
alternate sample by sample. The high watermarks are never exceeded. The low one is at least one window, since training
needs a whole window to free anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from specforge_core.contracts import InFlight


class Decision(Enum):
    """Whether the next batch may be offered for capture now."""

    GO = "go"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermarks:
    """In flight: offered for capture and not yet trained.

    :param high_watermark_bytes: also counts what is trained and kept until a checkpoint covers it; None: no limit.
    :raises ValueError: low is not below high, or not positive.
    """

    high_watermark_refs: int
    low_watermark_refs: int
    high_watermark_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.low_watermark_refs < self.high_watermark_refs:
            raise ValueError(f"need 0 < low < high, got {self.low_watermark_refs} and {self.high_watermark_refs}")
        if self.high_watermark_bytes is not None and self.high_watermark_bytes < 1:
            raise ValueError(f"high_watermark_bytes is {self.high_watermark_bytes}")


class Backpressure:
    """Begins with GO."""

    def __init__(self, watermarks: Watermarks):
        self._watermarks = watermarks
        self._decision = Decision.GO

    def observe(self, in_flight: InFlight, *, batch: InFlight, kept_bytes: int = 0) -> Decision:
        """What to do with the next batch now that so much is in flight.

        :param batch: what the next batch would add.
        :param kept_bytes: of samples that are trained and not yet freed.
        """
        if self.is_low(in_flight):
            self._decision = Decision.GO
        too_many = in_flight.refs + batch.refs > self._watermarks.high_watermark_refs
        if too_many or not self.has_room(in_flight.nbytes + batch.nbytes + kept_bytes):
            self._decision = Decision.PAUSE
        return self._decision

    def is_low(self, in_flight: InFlight) -> bool:
        """Whether so little is in flight that capture should go on."""
        return in_flight.refs < self._watermarks.low_watermark_refs

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes in all are within the high watermark."""
        limit = self._watermarks.high_watermark_bytes
        return limit is None or nbytes <= limit
