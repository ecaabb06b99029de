# SPDX-License-Identifier: Apache-2.0
"""Who is told what training does. An observer may not change the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from specforge_core.training.evaluator import Evaluation
    from specforge_core.training.window_step import WindowResult

Outcome = Literal["finished", "stopped", "failed"]


class Observer(Protocol):
    """Told about one run, in order, from the trainer's thread."""

    def run_started(self, step: int, total_steps: int) -> None:
        """Training begins, or goes on, after ``step`` finished optimizer steps."""
        ...

    def window_trained(self, result: WindowResult) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def checkpoint_saved(self, step: int, path: Path) -> None:
        """A complete checkpoint is on disk."""
        ...

    def run_finished(self, outcome: Outcome) -> None: ...


class Observers:
    """Several observers, told one after another."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def run_started(self, step: int, total_steps: int) -> None:
        for observer in self._observers:
            observer.run_started(step, total_steps)

    def window_trained(self, result: WindowResult) -> None:
        for observer in self._observers:
            observer.window_trained(result)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        for observer in self._observers:
            observer.evaluated(step, evaluation)

    def checkpoint_saved(self, step: int, path: Path) -> None:
        for observer in self._observers:
            observer.checkpoint_saved(step, path)

    def run_finished(self, outcome: Outcome) -> None:
        for observer in self._observers:
            observer.run_finished(outcome)
