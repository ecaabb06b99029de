# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a run would do, composed without importing torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specforge_core.cli.data_report import render_outlook
from specforge_core.cli.session import OVERRIDES_HELP, RUN_HELP, compose_run
from specforge_core.cli.text_table import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from specforge_core.config.plan import Plan
    from specforge_core.contracts import Split
    from specforge_core.hooks.descriptors import PartSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan")(plan)


def plan(
    ctx: typer.Context,
    *,
    run: Annotated[Path, typer.Argument(metavar="RUN", help=RUN_HELP, show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=OVERRIDES_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Compose a run from its parts and print what it would do, or everything that does not fit.

    Imports no torch, loads no model, writes nothing.

    Example: specforge plan run.yaml topology=colocated
    """
    from rich.console import Console

    composed = compose_run(ctx.obj, run, overrides or [])
    data = look_at_data(composed)
    if as_json:
        typer.echo(json.dumps({**composed.as_json(), "data": data}, indent=2))
        return
    console = Console()
    render_plan(composed, console)
    for split, outlook in data.items():
        for line in render_outlook(split, outlook):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def look_at_data(plan: Plan) -> dict[str, Any]:
    """What of its data the run will meet, by split."""
    from specforge_core.prompts.outlook import look_ahead
    from specforge_core.run.directory import RunDirectory

    directory, data = RunDirectory.of(plan.config), plan.config.data
    splits: dict[Split, Any] = {"train": (data.train, data)}
    if data.eval:
        splits["eval"] = (data.eval, data.model_copy(update={"max_prompts": None}))
    return {
        split: look_ahead(
            sources, directory=directory.prompts(split), settings=settings, vocab_size=plan.info.vocab_size
        )
        for split, (sources, settings) in splits.items()
    }


def render_plan(plan: Plan, console: Console) -> None:
    """Parts, tensors, bytes and what each half will do."""
    from rich.markup import escape
    from rich.table import Table

    config, info = plan.config, plan.info
    parts = Table("part", "name", "from", "what it is", title="parts", title_justify="left")
    specs: list[PartSpec] = [plan.strategy, plan.target_engine, plan.feature_store, plan.ref_channel]
    for spec in specs:
        source = plan.provenance[f"{spec.kind}:{spec.name}"]
        parts.add_row(
            spec.kind, escape(spec.name), f"{source['distribution']} {source['version']}", escape(spec.summary)
        )
    tensors = Table("tensor", "shape", "dtype", "bytes", title="one sample, longest", title_justify="left")
    for tensor in plan.tensors:
        norm = f" ({tensor.norm} norm)" if tensor.norm else ""
        tensors.add_row(f"{tensor.name}{norm}", str(list(tensor.shape)), tensor.dtype, format_bytes(tensor.nbytes))
    console.print(parts)
    console.print(tensors)
    halves = plan.halves()
    lines = [
        f"run        {config.run.directory} ({config.topology})",
        f"target     {info.name_or_path}: {info.architecture}, {info.num_layers} layers, hidden {info.hidden_size}, "
        f"vocabulary {info.vocab_size}, {info.dtype}",
        f"layers     {', '.join(str(layer) for layer in plan.request.aux_layer_ids) or 'none'} captured",
        f"bytes      {format_bytes(plan.bytes_per_token)} per token, {format_bytes(plan.bytes_per_sample)} per sample, "
        f"{format_bytes(plan.bytes_per_window)} per window, at most",
        f"capture    {halves['capture']}",
        f"train      {halves['train']}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
