# SPDX-License-Identifier: Apache-2.0
"""The training loop. Read this first.

A window is one optimizer step. The trainer takes windows from the loader, trains each, evaluates and checkpoints when
due, and acknowledges the window last. It ends finished, stopped (with a checkpoint) or failed (with the error).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specforge_core.contracts import CheckpointError, Progress, RunStopped, SpecForgeError
from specforge_core.training.metrics_log import window_values

if TYPE_CHECKING:
    from specforge_core.checkpoint.resume import CheckpointReader
    from specforge_core.checkpoint.writer import CheckpointWriter
    from specforge_core.loading.held_out import HeldOut
    from specforge_core.loading.loader import Loader
    from specforge_core.loading.windows import Window
    from specforge_core.training.evaluator import Evaluation, Evaluator
    from specforge_core.training.observers import Observers, Outcome
    from specforge_core.training.window_step import WindowResult, WindowStep

_SHOWN = ("loss", "simulated_acceptance_length", "tokens_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerParts:
    """What the loop drives.

    :param held_out: features to evaluate on, or None.
    :param checkpoint_every_steps: also at the end, when the run is stopped or fails, and when capture has no room left
        but for what waits for a checkpoint.
    :param evaluate_every_steps: None: with each checkpoint; either way also at the end.
    """

    loader: Loader
    step: WindowStep
    evaluator: Evaluator
    held_out: HeldOut | None
    writer: CheckpointWriter
    reader: CheckpointReader
    observers: Observers
    progress: Progress
    checkpoint_every_steps: int
    evaluate_every_steps: int | None = None


@dataclass(slots=True)
class TrainState:
    """Where training stands: what a checkpoint records besides tensors."""

    step: int = 0
    epoch: int = 0

    def advance(self, window: Window) -> None:
        self.step = window.index + 1
        self.epoch = window.epoch


class Trainer:
    """Trains one run to its end, from its latest checkpoint if it has one."""

    def __init__(self, parts: TrainerParts) -> None:
        self.loader = parts.loader
        self.step = parts.step
        self.observers = parts.observers
        self.state = TrainState()
        self._parts = parts
        self._parallelism = parts.step.parallelism
        self._saved_step = 0
        self._evaluated_step: int | None = None
        self._score: float | None = None

    def fit(self) -> Outcome:
        """Train; returns ``finished`` or ``stopped``.

        :raises SpecForgeError: training failed. What was trained before is in a checkpoint where one could be written.
        """
        outcome: Outcome = "failed"
        try:
            self._resume()
            self.observers.run_started(self.state.step, self.loader.plan.total_windows)
            outcome = self._train()
        except BaseException as error:  # whatever it is, the capture half must not wait for us
            self.loader.supply.fail(str(error) or type(error).__name__)
            self._rescue(error)
            raise
        finally:
            self.observers.run_finished(outcome)
        return outcome

    def _train(self) -> Outcome:
        total = self.loader.plan.total_windows
        self._parts.progress.begin("training", total)
        self._parts.progress.advance(self.state.step)
        try:
            self.loader.supply.relieve_by(self._checkpoint_and_free)
            with closing(self._windows()) as windows:
                for window in windows:  # one window is one optimizer step
                    result = self.step.run(window)  # forward, backward, clip, update
                    self.state.advance(window)
                    self.observers.window_trained(result)
                    self._show(result)
                    self._evaluate_when_due()
                    self._checkpoint_when_due()
                    self.acknowledge(window)  # last: features may now be freed
        except RunStopped:
            self._checkpoint_and_free()
            return "stopped"
        self._evaluate()
        self._checkpoint_and_free()
        return "finished"

    def acknowledge(self, window: Window) -> None:
        """The window is trained: tell capture, and free what a checkpoint covers. One rank speaks for all."""
        if self._parallelism.rank != 0:
            return
        self.loader.acknowledge(window)
        if self.loader.supply.short_of_room or self._saved_step == self.state.step:
            self._checkpoint_and_free()

    def _windows(self) -> Generator[Window]:
        """The loader's windows, ended on every rank at the same one if any rank is asked to stop."""
        with closing(self.loader.windows(self.state.step)) as windows:
            while True:
                window, stopped = None, None
                try:
                    window = next(windows, None)
                except RunStopped as error:
                    stopped = error
                if self._parallelism.agree(stopped is not None):
                    raise stopped or RunStopped("stopped: another rank was asked to stop")
                if window is None:
                    return
                yield window

    def _show(self, result: WindowResult) -> None:
        values = window_values(result)
        self._parts.progress.advance(1, **{name: values[name] for name in _SHOWN if name in values})

    def _evaluate_when_due(self) -> None:
        every = self._parts.evaluate_every_steps or self._parts.checkpoint_every_steps
        if self.state.step % every == 0:
            self._evaluate()

    def _checkpoint_when_due(self) -> None:
        if self.state.step % self._parts.checkpoint_every_steps == 0:
            self._checkpoint()

    def _evaluate(self) -> None:
        if self._parts.held_out is None or self._evaluated_step == self.state.step:
            return
        self._parts.progress.waiting("evaluation")
        evaluation = self._parts.evaluator.run(self.step.draft, self._parts.held_out, step=self.state.step)
        self._parts.progress.waiting(None)
        self._evaluated_step = self.state.step
        self._score = _score(evaluation)
        self.observers.evaluated(self.state.step, evaluation)

    def _checkpoint(self) -> None:
        """Write a checkpoint of the present step, unless there is one. Ranks are equal, so one writes."""
        if self._saved_step == self.state.step:
            return
        if self._parallelism.rank == 0:
            path = self._parts.writer.write(
                self.state.step,
                tensors=self.step.optimizer.state(),
                progress={"epoch": self.state.epoch},
                score=self._score if self._evaluated_step == self.state.step else None,
            )
            self.observers.checkpoint_saved(self.state.step, path)
        self._saved_step = self.state.step

    def _checkpoint_and_free(self) -> None:
        """Also free what the checkpoint covers; for when the step's window is acknowledged, never before."""
        self._checkpoint()
        if self._parallelism.rank == 0:
            self.loader.supply.free_covered(self.state.step)

    def _resume(self) -> None:
        progress = self._parts.reader.resume(self.step.optimizer.state())
        if progress is None:
            return
        self.step.optimizer.publish_masters()
        self.state = TrainState(step=progress["step"], epoch=progress["epoch"])
        self._saved_step = self.state.step
        if progress["score"] is not None:
            self._evaluated_step = self.state.step

    def _rescue(self, error: BaseException) -> None:
        """After a failure outside the update itself, keep what was trained since the last checkpoint."""
        if not isinstance(error, SpecForgeError) or isinstance(error, CheckpointError):
            return
        try:
            self._checkpoint()
        except CheckpointError as second:
            error.add_note(f"and what was trained since step {self._saved_step} is lost: {second}")


def _score(evaluation: Evaluation) -> float | None:
    """What ``best`` means: the longest simulated acceptance, or the smallest loss where no position was counted."""
    length = evaluation.simulated_acceptance_length
    if length is not None:
        return length
    return None if evaluation.loss is None else -evaluation.loss
