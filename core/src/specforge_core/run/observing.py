# SPDX-License-Identifier: Apache-2.0
"""Observers that connect a run to its directory and to installed observer plugins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.hooks.observers import Observers as PluginObservers
from specforge_core.run.directory import RunDirectory, to_yaml, write_json, write_text
from specforge_core.run.own_runs import mark_as_own
from specforge_core.training.evaluator import Evaluation
from specforge_core.training.metrics_log import window_values
from specforge_core.training.observers import Outcome
from specforge_core.training.window_step import WindowResult


class RunRecord:
    """Writes what the run is, once it is sure to go on (a refused resume changes nothing)."""

    def __init__(self, directory: RunDirectory, *, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self._directory = directory
        self._config = config
        self._provenance = provenance

    def run_started(self, step: int, total_steps: int) -> None:
        write_text(self._directory.config, mark_as_own(to_yaml(self._config), self._directory.root))
        write_json(self._directory.provenance, self._provenance)

    def window_trained(self, result: WindowResult) -> None:
        pass

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        pass

    def checkpoint_saved(self, step: int, path: Path) -> None:
        pass

    def run_finished(self, outcome: Outcome) -> None:
        pass


class PluginObserver:
    """Passes on to observer plugins what the trainer tells."""

    def __init__(self, plugins: PluginObservers, directory: RunDirectory) -> None:
        self._plugins = plugins
        self._run = str(directory.root)

    def run_started(self, step: int, total_steps: int) -> None:
        self._plugins.run_started(self._run)

    def window_trained(self, result: WindowResult) -> None:
        self._plugins.window_trained(self._run, result.step, window_values(result))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._plugins.evaluated(self._run, step, evaluation.values())

    def checkpoint_saved(self, step: int, path: Path) -> None:
        self._plugins.checkpoint_saved(self._run, step, path)

    def run_finished(self, outcome: Outcome) -> None:
        self._plugins.run_finished(self._run, outcome)
