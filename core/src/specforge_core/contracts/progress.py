# SPDX-License-Identifier: Apache-2.0
"""How a stage says where it stands, without knowing who shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by one stage of one half; shown by the command line."""

    def begin(self, description: str, total: int | None) -> None:
        """A new piece of work of ``total`` units (None: unknown) starts."""
        ...

    def advance(self, units: int, **values: float) -> None:
        """So many more units are done; ``values`` (loss, tokens/s, …) are shown beside the bar."""
        ...

    def waiting(self, reason: str | None) -> None:
        """What the stage is waiting for now, or None when it goes on."""
        ...


class SilentProgress:
    """Shows nothing."""

    def begin(self, description: str, total: int | None) -> None:
        pass

    def advance(self, units: int, **values: float) -> None:
        pass

    def waiting(self, reason: str | None) -> None:
        pass
