# SPDX-License-Identifier: Apache-2.0
"""``regenerate``: the prompts of a run, answered by its target."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from specforge_core.cli.run_commands import Overrides, RunArgument
from specforge_core.cli.session import console, messages, open_run
from specforge_core.cli.text_table import format_table
from specforge_core.contracts import ConfigError, Split


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("regenerate")(regenerate)


def regenerate(
    ctx: typer.Context,
    run: RunArgument,
    overrides: Overrides = None,
    *,
    split: Annotated[str, typer.Option("--split", help="train: data.train; eval: data.eval.")] = "train",
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="The first N rows only.")] = None,
) -> None:
    """Let the target answer a run's prompts: a draft learns most from what its target really says.

    The questions, tool results and system texts of data.train stay; every answer is made anew, each upon the target's
    own answers before it (regenerate.turns=last: the last one alone). The target runs in this process, or is asked on
    servers (regenerate.servers). Killed at any time it goes on where it was; started on several machines with one
    regenerate.output on a shared mount, they share the work.

    The rows that come out are a source: name them in data.train of the run that trains.

    Example: specforge regenerate run.yaml regenerate.servers=[http://host:8000/v1] regenerate.concurrency=256
    """
    if split not in ("train", "eval"):
        raise ConfigError(f"there is no split {split!r}", where="--split", hint="train or eval")
    with open_run(ctx.obj, run, overrides or [], threads_of="capture") as opened:
        from specforge_core.prompts.regeneration.dialogue import ENDINGS
        from specforge_core.run.regenerate import regenerate as make

        made = make(opened, cast("Split", split), limit=limit)
    rows = [(str(count), ENDINGS[name]) for name, count in made.endings.items()]
    if made.unusable:
        rows.append((str(made.unusable), "rows that are no conversation with an answer, and are left out"))
    console.print(format_table(("", "what became of them"), rows), markup=False, highlight=False, soft_wrap=True)
    by = ", ".join(f"{name} {value}" for name, value in made.answered_by.items())
    messages.print(f"answered by: {by}\nrows: {made.rows}", markup=False, highlight=False, soft_wrap=True)
