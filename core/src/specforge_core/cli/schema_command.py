# SPDX-License-Identifier: Apache-2.0
"""``schema``: the run file's JSON schema, for editors."""

from __future__ import annotations

import json

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("schema")(schema)


def schema(ctx: typer.Context) -> None:
    """Print the JSON schema of the run file, sections of installed plugins included.

    \b
    Example: specforge schema > specforge.schema.json
    and as the first line of a run file:
      # yaml-language-server: $schema=specforge.schema.json
    """
    from specforge_core.config.schema import run_schema

    built, failures = run_schema(ctx.obj)
    for failure in failures:
        typer.echo(f"left out: {failure}", err=True)
    typer.echo(json.dumps(built, indent=2))
