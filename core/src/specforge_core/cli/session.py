# SPDX-License-Identifier: Apache-2.0
"""What every command that works on a run does first: read, compose, and watch for Ctrl-C while it works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from specforge_core.cli.progress import show_progress
from specforge_core.config.plan import Plan, compose
from specforge_core.contracts import StopSignal
from specforge_core.hooks.manager import PluginRegistry

if TYPE_CHECKING:
    from specforge_core.run.assemble import Run

RUN_HELP = (
    "Run file, or the directory of a run that was started. A directory that you did not make on this machine is data: "
    "what it may run, connect to or write elsewhere must be said again as KEY=VALUE."
)
OVERRIDES_HELP = "Overrides such as training.epochs=2."

console = Console()
messages = Console(stderr=True)


@contextmanager
def open_run(
    registry: PluginRegistry, run: Path, overrides: Sequence[str], *, threads_of: str = "training"
) -> Iterator[Run]:
    """Compose a run and open it; torch is imported here, after everything that can be refused was.

    :param threads_of: the section whose ``threads`` this process computes with.
    """
    with open_plan(compose_run(registry, run, overrides), registry, threads_of=threads_of) as opened:
        yield opened


def compose_run(registry: PluginRegistry, run: Path, overrides: Sequence[str]) -> Plan:
    """The plan of what a user calls a run, with its overrides."""
    from specforge_core.run.own_runs import load_run

    return compose(load_run(run, overrides), registry)


@contextmanager
def open_plan(plan: Plan, registry: PluginRegistry, *, threads_of: str = "training") -> Iterator[Run]:
    """Open a composed run, with progress shown and signals watched while the block works."""
    from specforge_core.run.assemble import Run
    from specforge_core.run.directory import RunDirectory
    from specforge_core.run.interrupt import stop_on_signal
    from specforge_core.run.machine import set_threads
    from specforge_core.run.observing import PluginObserver

    section = plan.config.capture if threads_of == "capture" else plan.config.training
    set_threads(section.threads)
    stop = StopSignal()
    observer = PluginObserver(registry.observers(), RunDirectory.of(plan.config))
    with stop_on_signal(stop), show_progress(messages) as display:
        run = Run(plan, stop=stop, progress=display.half, observers=[observer])
        try:
            yield run
        finally:
            run.close()
