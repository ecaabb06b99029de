# SPDX-License-Identifier: Apache-2.0
"""How far capture may run ahead of training: a pure state machine. Clock, thread and channel are the loop's.

It pauses at a high watermark and goes on below a low one, so that the two halves do not alternate sample by sample.
Below the low watermark it never pauses, whatever the bytes: that is at least one window, and training needs a whole
window to free anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from specforge_core.contracts import InFlight


class Decision(Enum):
    """Whether the next batch may be captured now."""

    GO = "go"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermarks:
    """In flight: published and not yet acked. ``low_watermark_refs`` is at least one window of samples.

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

    def observe(self, in_flight: InFlight) -> Decision:
        """What to do now that so much is in flight."""
        if in_flight.refs < self._watermarks.low_watermark_refs:
            self._decision = Decision.GO
        elif in_flight.refs >= self._watermarks.high_watermark_refs or self._too_many_bytes(in_flight.nbytes):
            self._decision = Decision.PAUSE
        return self._decision

    def _too_many_bytes(self, nbytes: int) -> bool:
        limit = self._watermarks.high_watermark_bytes
        return limit is not None and nbytes >= limit
