# SPDX-License-Identifier: Apache-2.0
"""``plugins``, and its ``check``, ``show`` and ``new``. Listing reads metadata; only check and show import plugins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from specforge_core.cli.plugin_list import print_plugins
from specforge_core.cli.text_table import format_table
from specforge_core.hooks.discovery import PluginEntry, list_entries

if TYPE_CHECKING:
    from pydantic import BaseModel

    from specforge_core.cli.plugin_check import CheckedPlugin
    from specforge_core.hooks.descriptors import PartSpec
    from specforge_core.hooks.kinds import Kind

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]

plugins = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(plugins, name="plugins")


@plugins.callback()
def list_plugins(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List installed plugins from their metadata; imports none of them.

    \b
    Status: ok; disabled (--no-plugin); shadowed (two distributions offer one name);
    incompatible (asks for another core); broken (see `specforge plugins check`).
    """
    if ctx.invoked_subcommand is None:
        print_plugins(ctx.obj, as_json=as_json)


@plugins.command("check")
def check_plugins(
    ctx: typer.Context,
    *,
    name: Annotated[str | None, typer.Argument(help="Name, distribution or KIND:NAME. Default: import all.")] = None,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds for each plugin.")] = 120.0,
    as_json: AsJson = False,
) -> None:
    """Look at plugins, each in a process of its own: import them all, or import one and try whether it works.

    With NAME, the quick part of its kind's contract suite is run too (it needs specforge-core[testing]).
    Exit status 1 if any is broken, incompatible or in conflict. Disabled plugins are passed over.
    """
    if not deadline > 0:
        raise typer.BadParameter(f"{deadline:g} is not above 0", param_hint="--deadline")
    from specforge_core.cli.plugin_check import check_entries

    entries = list_entries(ctx.obj)
    chosen = [entry for entry in _select(entries, name) if entry.status != "disabled"]
    results = check_entries(chosen, among=entries, deadline=deadline, contract=name is not None)
    if as_json:
        typer.echo(json.dumps([result.as_json() for result in results], indent=2))
    else:
        rows = [(r.kind, r.name, r.distribution, r.version, r.status) for r in (c.entry for c in results)]
        typer.echo(format_table(("KIND", "NAME", "DISTRIBUTION", "VERSION", "STATUS"), rows))
        for result in results:
            typer.echo(_format_findings(result), nl=False)
    if any(result.entry.status != "ok" for result in results):
        raise typer.Exit(1)


def _format_findings(checked: CheckedPlugin) -> str:
    """What was found besides the status, and how each test of the contract ended."""
    entry = checked.entry
    said = [text for text in (entry.detail, checked.remark) if text]
    lines = [f"{entry.kind} {entry.name} of {entry.source}: {text}" for text in said]
    if checked.contract:
        lines += ["", f"the contract of a {entry.kind}, on {entry.name}:"]
    for test, ended in checked.contract.items():
        status, _, reason = ended.partition(": ")
        lines.append(f"  {status:<15} {test.removeprefix('test_').replace('_', ' ')}")
        lines += [f"  {'':<15}   {reason}"] if reason else []
    return "".join(f"{line}\n" for line in lines)


@plugins.command("show")
def show_plugin(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Name, distribution or KIND:NAME.")],
    as_json: AsJson = False,
) -> None:
    """Everything about a plugin: where it comes from, what it can do, and its settings in a run file.

    Example: specforge plugins show feature-store:file
    """
    from specforge_core.hooks.manager import PluginRegistry

    registry = PluginRegistry(list_entries(ctx.obj))
    shown = []
    for entry in registry.find(name):
        usable = entry.status == "ok" and entry.kind != "observer"
        spec = registry.part(entry.kind, entry.name) if usable else None
        shown.append(_describe(entry, spec))
        if not as_json:
            typer.echo(_format_entry(entry, spec))
    if as_json:
        typer.echo(json.dumps(shown, indent=2))


@plugins.command("new")
def new_plugin(
    name: Annotated[str, typer.Argument(help="What run files will say: small letters, digits and dashes.")],
    kind: Annotated[
        str, typer.Option("--kind", help="strategy, target-engine, feature-store or ref-channel.", show_default=False)
    ],
    directory: Annotated[
        Path | None, typer.Option("--directory", help="Where to write it. Default: the distribution's name.")
    ] = None,
) -> None:
    """Write a distribution that offers a new part: it installs, works and keeps its contract as it is.

    Example: specforge plugins new mine --kind strategy
    """
    from specforge_core.cli.plugin_skeleton import write_skeleton

    made = write_skeleton(name, cast("Kind", kind), directory)
    for path in made.files:
        typer.echo(path)
    for source in made.installed:
        typer.echo(f"note: {source} offers {kind} {name} already; only one of the two can be installed", err=True)
    typer.echo(f"\nnext: pip install -e '{made.directory}[test]' && specforge plugins check {kind}:{name}")
    typer.echo(f"then: see {made.directory / 'README.md'}; pytest {made.directory} runs the whole contract suite")


def _select(entries: list[PluginEntry], name: str | None) -> list[PluginEntry]:
    if name is None:
        return entries
    from specforge_core.hooks.manager import PluginRegistry

    return PluginRegistry(entries).find(name)


def _describe(entry: PluginEntry, spec: PartSpec | None) -> dict[str, object]:
    if spec is None:
        return dict(entry.as_json())
    return {**entry.as_json(), "summary": spec.summary, "factory": spec.factory, "schema": _schema(spec.config)}


def _schema(config: type[BaseModel]) -> dict[str, object]:
    return config.model_json_schema()


def _format_entry(entry: PluginEntry, spec: PartSpec | None) -> str:
    lines = [
        f"{entry.kind} {entry.name}: {spec.summary if spec else entry.status}",
        f"  from      {entry.source} ({entry.origin}), {entry.value}",
        f"  core      {entry.requires or 'no requirement'}",
        f"  status    {entry.status}{': ' + entry.detail if entry.detail else ''}",
    ]
    if spec is None:
        return "\n".join(lines)
    lines.append(f"  loads     {spec.factory}")
    lines += [f"  can       {text}" for text in _capabilities(spec)]
    lines.append("  settings")
    for name, field in spec.config.model_fields.items():
        if name != "name":
            default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)}"
            lines.append(f"    {name}: {field.description or ''} [{default}]")
    return "\n".join(lines)


def _capabilities(spec: PartSpec) -> list[str]:
    from dataclasses import asdict

    from specforge_core.hooks.descriptors import StrategySpec

    if isinstance(spec, StrategySpec):
        return [f"export to {', '.join(spec.export_formats)}"] if spec.export_formats else []
    return [f"{key.replace('_', ' ')}: {value}" for key, value in asdict(spec.capabilities).items()]
