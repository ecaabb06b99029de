# SPDX-License-Identifier: Apache-2.0
"""An observer that remembers what a training run told it."""

from __future__ import annotations

from pathlib import Path

from specforge_core.contracts import StopSignal
from specforge_core.training.evaluator import Evaluation
from specforge_core.training.window_step import WindowResult


class Recorder:
    """Remembers, and asks to stop after a step if told so."""

    def __init__(self, stop: StopSignal | None = None, after: int = 0) -> None:
        self.events: list[str] = []
        self.results: list[WindowResult] = []
        self.evaluations: list[Evaluation] = []
        self._stop = stop
        self._after = after

    def run_started(self, step: int, total_steps: int) -> None:
        self.events.append(f"started {step}/{total_steps}")

    def window_trained(self, result: WindowResult) -> None:
        self.results.append(result)
        if self._stop is not None and result.step == self._after:
            self._stop.request("test")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self.events.append(f"evaluated {step}")
        self.evaluations.append(evaluation)

    def checkpoint_saved(self, step: int, path: Path) -> None:
        self.events.append(f"saved {step}")

    def run_finished(self, outcome: str) -> None:
        self.events.append(outcome)
