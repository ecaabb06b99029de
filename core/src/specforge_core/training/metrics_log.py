# SPDX-License-Identifier: Apache-2.0
"""One JSON line per optimizer step and per evaluation: an observer that writes what reports are drawn from.

A line is appended whole. When a run resumes, lines of steps that its checkpoint does not cover are dropped, with a
line that a crash cut short, so every step stands there once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError, simulated_acceptance_length
from specforge_core.contracts.files import open_regular, parse_json, read_bytes, replace_file

if TYPE_CHECKING:
    from specforge_core.training.evaluator import Evaluation
    from specforge_core.training.observers import Outcome
    from specforge_core.training.window_step import WindowResult


_MOST_BYTES = 256 << 20
"""Of a log that is gone on with: a million steps. A file of nothing but a length would take the machine's memory."""


def window_values(result: WindowResult) -> dict[str, float]:
    """What one optimizer step is shown as, by name; a metric that counted nothing is left out.

    ``accuracy_k`` is the accuracy at draft position k; rates are per second of training and waiting together.
    """
    elapsed = result.seconds + result.waited_seconds
    found: dict[str, float | None] = {
        "step": result.step,
        "epoch": result.epoch,
        "loss": result.loss if result.num_tokens else None,  # a window of skipped samples alone has none
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens": result.num_tokens,
        "tokens_per_second": result.num_tokens / elapsed if elapsed else None,
        "seconds": result.seconds,
        "waited_seconds": result.waited_seconds,
        "simulated_acceptance_length": simulated_acceptance_length(result.position_accuracy),
    }
    found |= {f"accuracy_{position}": ratio.value for position, ratio in enumerate(result.position_accuracy)}
    found |= {name: ratio.value for name, ratio in result.metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


class MetricsLog:
    """Writes ``metrics`` (a line per step) and ``evaluations`` (a line per evaluation).

    Each raises DataError where that cannot be done: a run whose record has holes is not shown as whole.
    """

    def __init__(self, metrics: Path, *, evaluations: Path) -> None:
        self._metrics = metrics
        self._evaluations = evaluations

    def run_started(self, step: int, total_steps: int) -> None:
        for path in (self._metrics, self._evaluations):
            with _writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _keep_steps(path, step)

    def window_trained(self, result: WindowResult) -> None:
        _append(self._metrics, window_values(result))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        _append(self._evaluations, {"step": step, **evaluation.values()})

    def checkpoint_saved(self, step: int, path: Path) -> None:
        pass

    def run_finished(self, outcome: Outcome) -> None:
        pass


def _append(path: Path, values: Mapping[str, Any]) -> None:
    with (
        _writing(path),
        open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8") as file,
    ):
        file.write(json.dumps(values) + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            hint="free space or correct the permissions there, then start the run again",
        ) from error


def _keep_steps(path: Path, step: int) -> None:
    """Drop lines after ``step`` and lines that are not whole."""
    if not path.exists():
        return
    lines = read_bytes(path, limit=_MOST_BYTES).splitlines(keepends=True)
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    if kept != lines:
        replace_file(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
