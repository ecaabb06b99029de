# SPDX-License-Identifier: Apache-2.0
"""``capture``, ``train`` and ``run``: the commands that do the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_core.cli.environment import hand_down, handed_down
from specforge_core.cli.session import OVERRIDES_HELP, RUN_HELP, compose_run, messages, open_plan, open_run
from specforge_core.contracts import StopSignal

if TYPE_CHECKING:
    from specforge_core.config.plan import Plan
    from specforge_core.contracts import Split
    from specforge_core.hooks.manager import PluginRegistry
    from specforge_core.run.assemble import Run
    from specforge_core.training.observers import Outcome

_GRACE_SECONDS = 30.0
"""For the other process to write a checkpoint and end, after one of them was asked to stop."""

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=RUN_HELP, show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=OVERRIDES_HELP)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("capture")(capture)
    app.command("train")(train)
    app.command("run")(run_both)


def capture(ctx: typer.Context, run: RunArgument, overrides: Overrides = None) -> None:
    """Capture the target's features of the run's prompts.

    Prompts are tokenised once and kept beside the features. Any number of processes, on any machines that reach the
    run's store and channel, capture one run together; what a process that dies had taken goes to the others. Offline
    each prompt is captured once and an interrupted capture goes on where it stopped; a disaggregated run's capture
    processes wait for `specforge train`, capture what it asks for, and end when it does.

    Example: specforge capture run.yaml capture.batch_size=16
    """
    with open_run(ctx.obj, run, [*handed_down(), *(overrides or [])], threads_of="capture") as opened:
        from specforge_core.run import roles

        counts = roles.capture(opened)
    _say_dropped(opened)
    set_aside = sum(count.set_aside for count in counts)
    text = f"captured {sum(count.samples for count in counts)} samples into the {opened.plan.feature_store.name} store"
    if set_aside:
        text += f"; {set_aside} could not be captured and were set aside, see the warnings above"
    messages.print(text, markup=False, highlight=False)


def train(ctx: typer.Context, run: RunArgument, overrides: Overrides = None) -> None:
    """Train the run's draft on captured features.

    Offline on what was captured before; disaggregated on what `specforge capture` processes capture meanwhile.
    Goes on from the latest checkpoint if there is one. Ctrl-C writes a checkpoint and leaves;
    a second one exits at once.

    Example: specforge train run.yaml training.learning_rate=5e-5
    """
    with open_run(ctx.obj, run, [*handed_down(), *(overrides or [])]) as opened:
        from specforge_core.run import roles

        outcome = roles.train(opened)
    _say_outcome(opened, outcome)


def run_both(
    ctx: typer.Context,
    run: RunArgument,
    overrides: Overrides = None,
    *,
    restarts: Annotated[
        int, typer.Option(min=0, help="Disaggregated: how often each half is started again if it is killed.")
    ] = 3,
) -> None:
    """Capture and train on this machine.

    An offline run captures first and trains then; a colocated run does both side by side, features never leaving
    memory; a disaggregated run has capture.processes capture processes and one train process, which are watched and
    started again if they are killed. The same command continues an interrupted run.

    Example: specforge run run.yaml topology=colocated
    """
    plan = compose_run(ctx.obj, run, overrides or [])
    if plan.config.topology == "disaggregated":
        raise typer.Exit(_supervise(ctx.obj, plan, str(run), overrides=overrides or [], restarts=restarts))
    with open_plan(plan, ctx.obj) as opened:
        from specforge_core.run import roles

        outcome = roles.capture_and_train(opened)
    _say_dropped(opened)
    _say_outcome(opened, outcome)


def _supervise(registry: PluginRegistry, plan: Plan, run: str, *, overrides: Sequence[str], restarts: int) -> int:
    """Both halves as processes of their own; returns the run's exit status."""
    from specforge_core.run.directory import RunDirectory
    from specforge_core.run.interrupt import stop_on_signal
    from specforge_core.run.supervisor import Half, supervise

    directory, stop = RunDirectory.of(plan.config), StopSignal()
    program = [sys.executable, "-P", "-m", "specforge_core.cli.main"]  # -P: nothing is imported from here
    for entry in registry.entries():
        if entry.status == "disabled":
            program += ["--no-plugin", f"{entry.kind}:{entry.name}"]
    captures = [
        Half(name=f"capture-{number}", command=[*program, "capture", run], environment=hand_down(overrides))
        for number in range(plan.config.capture.processes)
    ]
    train_half = Half(name="train", command=[*program, "train", run], environment=hand_down(overrides))
    with directory.lock("run"), stop_on_signal(stop):
        messages.print(f"capture processes write to {directory.logs}", markup=False, highlight=False)
        return supervise(
            [train_half, *captures],
            main="train",
            logs=directory.logs,
            stop=stop,
            restarts=restarts,
            grace_seconds=_GRACE_SECONDS,
        )


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
    skipped = run.train_end.supply.skipped
    if skipped:
        text = f"{skipped} samples could not be captured; their windows trained without them"
        messages.print(text, markup=False, highlight=False)
    text = f"trained {step} steps; next: specforge export {directory}, specforge bench {directory}"
    messages.print(text, markup=False, highlight=False)
