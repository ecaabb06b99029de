# SPDX-License-Identifier: Apache-2.0
"""``regenerate``: answers made by the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from specforge_core.cli.run_commands import Overrides, RunArgument
from specforge_core.cli.session import console, messages, open_run
from specforge_core.cli.text_table import format_table
from specforge_core.contracts.redaction import redact_message, visible

if TYPE_CHECKING:
    from specforge_core.run.regenerate import Regenerated


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("regenerate")(regenerate)


def regenerate(
    ctx: typer.Context,
    run: RunArgument,
    overrides: Overrides = None,
    *,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Which of the run's data.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many conversations.")] = None,
) -> None:
    """Have the target answer the run's prompts itself: a draft learns most from what its target really says.

    Reads data.train (or data.eval), keeps every turn that is not an answer, and has each answer made by the target
    upon its own answers before it (regenerate.turns=last: only the last one). What comes out is a directory that
    data.train takes, with token ids and masks as they were served where they are known, and a report of what was made,
    cut and failed.

    The target answers in this process, or on servers that speak the OpenAI chat API (regenerate.servers). Killed at
    any time, the same command goes on and asks nothing again that was recorded; started on several machines that share
    the output directory, it shares the work.

    \b
    Examples:
      specforge regenerate run.yaml
      specforge regenerate run.yaml --limit 50 regenerate.max_tokens=256
      specforge regenerate run.yaml 'regenerate.servers=[http://gpu1:8000/v1, http://gpu2:8000/v1]' \\
        regenerate.concurrency=256 regenerate.thinking=mixed regenerate.temperature=0.7
      specforge run run.yaml 'data.train=[runs/mine/regenerated/train]'
    """
    with open_run(ctx.obj, run, overrides or [], threads_of="capture") as opened:
        from specforge_core.run.regenerate import regenerate as make_answers

        made = make_answers(opened, split, limit=limit)
    show_report(made)
    text = f"next: specforge run {run} 'data.{split}=[{made.directory}]'"
    messages.print(redact_message(text), markup=False, highlight=False, soft_wrap=True)


def show_report(made: Regenerated) -> None:
    """Print what was made as a table."""
    from specforge_core.prompts.regeneration.regenerated_set import report_table

    rows = [(visible(redact_message(what)), count) for what, count in report_table(made.report)]
    table = format_table(("answers made by the target", ""), rows)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{made.directory}", markup=False, highlight=False, soft_wrap=True)
