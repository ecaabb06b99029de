# SPDX-License-Identifier: Apache-2.0
"""``demo``: the whole path on a small real target, with nothing but what is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_core.cli.bench_table import bench_table
from specforge_core.cli.progress import show_progress
from specforge_core.cli.session import console, messages, open_run
from specforge_core.contracts import Split
from specforge_core.hooks.manager import PluginRegistry

if TYPE_CHECKING:
    from specforge_core.run.demo import DemoRun

_SPLITS: tuple[Split, ...] = ("train", "eval")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    ctx: typer.Context,
    *,
    strategy: Annotated[str | None, typer.Argument(help="Strategy; needed where several are installed.")] = None,
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Run directory. Default: runs/demo-STRATEGY.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where the demo's target is kept. Default: the user's cache.")
    ] = None,
) -> None:
    """Train a small target from nothing, let it answer, train a draft for it; evaluate, export, bench and report.

    Needs no network and no weights. A second demo finds the target in the cache.
    """
    registry: PluginRegistry = ctx.obj
    began = time.monotonic()
    with _step("target"):
        demo_run = _prepare(registry, strategy, directory, cache)
    with _step("answers"):
        _answer(registry, demo_run.answers)
    with open_run(registry, demo_run.training, []) as run:
        from specforge_core.run import measure, roles

        with _step("capture"):
            roles.capture(run)
        with _step("train"):
            roles.train(run)
        trained = measure.load_checkpoint(run, "latest")
        with _step("evaluate"):
            evaluation = measure.evaluate_draft(run, trained)
        with _step("export"):
            exported = measure.write_export(run, trained, format=None, overwrite=True)
        with _step("bench"):
            result = measure.bench_draft(run, measure.load_exported(run, exported))
    with _step("report"):
        page = _report(run.directory.root)
    simulated = evaluation.simulated_acceptance_length
    console.print(bench_table(result))
    console.print(
        f"simulated acceptance length on held-out features: {simulated:.2f}\n" if simulated else "",
        f"export: {exported}\nreport: {page}\nrun again: specforge bench {run.directory.root}\n"
        f"took {time.monotonic() - began:.0f} s",
        markup=False,
        highlight=False,
        soft_wrap=True,
        sep="",
    )
    result.raise_if_lossy()


def _answer(registry: PluginRegistry, run_file: Path) -> None:
    with open_run(registry, run_file, [], threads_of="capture") as run:
        from specforge_core.run.regenerate import regenerate

        for split in _SPLITS:
            regenerate(run, split)


def _prepare(registry: PluginRegistry, strategy: str | None, directory: Path | None, cache: Path | None) -> DemoRun:
    from specforge_core.run.demo import choose_strategy, default_cache, write_demo_run

    name = choose_strategy(registry, strategy)
    with show_progress(messages) as display:
        return write_demo_run(
            registry,
            name,
            directory=directory or Path("runs") / f"demo-{name}",
            cache=cache or default_cache(),
            progress=display.half("target"),
        )


def _report(root: Path) -> Path:
    from specforge_core.reporting.report import write_report

    return write_report(root)


@contextmanager
def _step(name: str) -> Iterator[None]:
    began = time.monotonic()
    messages.rule(name)
    yield
    messages.print(f"{name}: {time.monotonic() - began:.1f} s", markup=False, highlight=False)
