# SPDX-License-Identifier: Apache-2.0
"""``eval``, ``export``, ``bench`` and ``report``: what is done with a trained draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_core.cli.bench_table import bench_table
from specforge_core.cli.run_commands import Overrides, RunArgument
from specforge_core.cli.session import console, messages, open_run

if TYPE_CHECKING:
    from specforge_core.run.assemble import Run
    from specforge_core.run.measure import TrainedDraft

Checkpoint = Annotated[
    str, typer.Option("--checkpoint", help="latest, best, or a checkpoint's directory.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("eval")(evaluate)
    app.command("export")(export)
    app.command("bench")(bench)
    app.command("report")(report)


def evaluate(
    ctx: typer.Context,
    run: RunArgument,
    *,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    as_json: AsJson = False,
) -> None:
    """Evaluate a draft on held-out features: loss, accuracy per position, simulated acceptance length.

    Also written to eval.json in the run directory.
    """
    with open_run(ctx.obj, run, overrides or []) as opened:
        from specforge_core.run.measure import evaluate_draft

        evaluation = evaluate_draft(opened, load_draft(opened, checkpoint))
    if as_json:
        console.print_json(json.dumps(evaluation.values()))
        return
    for name, value in evaluation.values().items():
        console.print(f"{name.replace('_', ' ')}: {value:.4f}", markup=False, highlight=False)


def export(
    ctx: typer.Context,
    run: RunArgument,
    *,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    format: Annotated[str | None, typer.Option("--format", help="Default: the strategy's first.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write the files a server loads, reload them and compare.

    They go to export/FORMAT in the run directory.
    """
    with open_run(ctx.obj, run, overrides or []) as opened:
        from specforge_core.run.measure import write_export

        directory = write_export(opened, load_draft(opened, checkpoint), format=format, overwrite=overwrite)
    console.print(str(directory), markup=False, highlight=False, soft_wrap=True)


def bench(
    ctx: typer.Context,
    run: RunArgument,
    *,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    draft: Annotated[Path | None, typer.Option("--draft", help="An export to bench instead of a checkpoint.")] = None,
    as_json: AsJson = False,
) -> None:
    """Decode held-out prompts with and without the draft and compare, token by token.

    Greedy on both sides. Any difference fails. Also written to bench.json in the run directory.

    Example: specforge bench RUN bench.prompts=50 bench.max_new_tokens=128
    """
    with open_run(ctx.obj, run, overrides or []) as opened:
        from specforge_core.run.measure import bench_draft, load_exported

        trained = load_exported(opened, draft) if draft else load_draft(opened, checkpoint)
        result = bench_draft(opened, trained)
    if as_json:
        console.print_json(json.dumps(result.to_json()))
    else:
        console.print(bench_table(result))
    result.raise_if_lossy()


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]) -> None:
    """Write one self-contained HTML page and pictures about a run into its report directory."""
    from specforge_core.reporting.report import write_report

    path = write_report(run)
    messages.print("report written:", markup=False, highlight=False)
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)


def load_draft(run: Run, checkpoint: str) -> TrainedDraft:
    """The draft of ``latest``, ``best`` or a checkpoint's directory."""
    from specforge_core.run.measure import load_checkpoint

    if checkpoint == "latest":
        return load_checkpoint(run, "latest")
    return load_checkpoint(run, "best" if checkpoint == "best" else Path(checkpoint))
