# SPDX-License-Identifier: Apache-2.0
"""``capture``, ``train`` and ``run``: the commands that do the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_core.cli.session import OVERRIDES_HELP, RUN_HELP, messages, open_run

if TYPE_CHECKING:
    from specforge_core.contracts import Split
    from specforge_core.run.assemble import Run
    from specforge_core.training.observers import Outcome

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=RUN_HELP, show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=OVERRIDES_HELP)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("capture")(capture)
    app.command("train")(train)
    app.command("run")(run_both)


def capture(ctx: typer.Context, run: RunArgument, overrides: Overrides = None) -> None:
    """Capture the target's features of the run's prompts.

    Prompts are tokenised once and kept beside the features. An interrupted capture goes on where it stopped.

    Example: specforge capture run.yaml capture.batch_size=16
    """
    with open_run(ctx.obj, run, overrides or [], threads_of="capture") as opened:
        from specforge_core.run import roles

        roles.capture(opened)
    _say_dropped(opened)
    messages.print(f"captured into {opened.directory.features}", markup=False, highlight=False)


def train(ctx: typer.Context, run: RunArgument, overrides: Overrides = None) -> None:
    """Train the run's draft on captured features.

    Goes on from the latest checkpoint if there is one. Ctrl-C writes a checkpoint and leaves;
    a second one exits at once.

    Example: specforge train run.yaml training.learning_rate=5e-5
    """
    with open_run(ctx.obj, run, overrides or []) as opened:
        from specforge_core.run import roles

        outcome = roles.train(opened)
    _say_outcome(opened, outcome)


def run_both(ctx: typer.Context, run: RunArgument, overrides: Overrides = None) -> None:
    """Capture and train in one process.

    An offline run captures first and trains then; a colocated run does both side by side, features never leaving
    memory. The same command continues an interrupted run.

    Example: specforge run run.yaml topology=colocated
    """
    with open_run(ctx.obj, run, overrides or []) as opened:
        from specforge_core.run import roles

        outcome = roles.capture_and_train(opened)
    _say_dropped(opened)
    _say_outcome(opened, outcome)


def _say_dropped(run: Run) -> None:
    """How many rows were left out, so that a corpus that mostly trains nothing is noticed."""
    splits: tuple[Split, ...] = ("train", "eval") if run.plan.config.data.eval else ("train",)
    for split in splits:
        prompts = run.prompts(split)
        if prompts.dropped:
            text = f"data.{split}: {len(prompts)} prompts; {prompts.dropped} rows left out, which train no token"
            messages.print(text, markup=False, highlight=False)


def _say_outcome(run: Run, outcome: Outcome) -> None:
    from specforge_core.run.interrupt import EXIT_INTERRUPTED

    step = run.checkpoint_reader.latest_step() or 0
    total, directory = run.window_plan.total_windows, run.directory.root
    if outcome == "stopped":
        text = f"{run.stop.reason}; checkpoint at step {step} of {total}. The same command goes on from there."
        messages.print(text, markup=False, highlight=False)
        raise typer.Exit(EXIT_INTERRUPTED)
    text = f"trained {step} steps; next: specforge export {directory}, specforge bench {directory}"
    messages.print(text, markup=False, highlight=False)
