# SPDX-License-Identifier: Apache-2.0
"""Calls the installed observers at the moments of a run, each on its own.

An observer may not change a run, so one that raises, or calls ``sys.exit``, is reported once, with its distribution,
and not called again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from specforge_core.hooks.discovery import PluginEntry
from specforge_core.hooks.foreign import describe_failure

_log = logging.getLogger(__name__)

OBSERVER_HOOKS = frozenset(
    {
        "specforge_run_started",
        "specforge_window_trained",
        "specforge_evaluated",
        "specforge_checkpoint_saved",
        "specforge_run_finished",
    }
)


class Observers:
    """The observers of one run; empty where none is installed.

    :param loaded: entries by the name under which ``manager`` knows their plugin.
    """

    def __init__(self, manager: pluggy.PluginManager, loaded: Mapping[str, PluginEntry]) -> None:
        self._manager = manager
        self._active = dict(loaded)

    @property
    def names(self) -> list[str]:
        """Observers that are still called."""
        return [entry.name for entry in self._active.values()]

    def run_started(self, run: str) -> None:
        self._call("specforge_run_started", {"run": run})

    def window_trained(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        self._call("specforge_window_trained", {"run": run, "step": step, "metrics": metrics})

    def evaluated(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        self._call("specforge_evaluated", {"run": run, "step": step, "metrics": metrics})

    def checkpoint_saved(self, run: str, step: int, path: Path) -> None:
        self._call("specforge_checkpoint_saved", {"run": run, "step": step, "path": path})

    def run_finished(self, run: str, outcome: str) -> None:
        self._call("specforge_run_finished", {"run": run, "outcome": outcome})

    def _call(self, hook: str, arguments: Mapping[str, Any]) -> None:
        for key, entry in list(self._active.items()):
            plugin = self._manager.get_plugin(key)
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            own = {name: dict(value) if isinstance(value, Mapping) else value for name, value in arguments.items()}
            try:
                self._manager.subset_hook_caller(hook, others)(**own)
            except BaseException as error:  # noqa: BLE001  while a run goes on, Ctrl-C is a signal and raises nothing
                del self._active[key]
                _log.warning(
                    "observer %r of %s failed in %s and is not called again: %s",
                    entry.name,
                    entry.source,
                    hook,
                    describe_failure(error),
                )
