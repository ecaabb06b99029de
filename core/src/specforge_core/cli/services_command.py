# SPDX-License-Identifier: Apache-2.0
"""``services``: development servers of the parts that need one. The parts bring them; this only finds and runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from specforge_core.contracts import PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    from specforge_core.hooks.descriptors import FeatureStoreSpec, RefChannelSpec
    from specforge_core.hooks.kinds import Kind
    from specforge_core.hooks.manager import PluginRegistry


@dataclass(frozen=True)
class Service:
    """A server that one part needs; ``path`` is its ``"module:function"``."""

    kind: Kind
    name: str
    path: str
    distribution: str


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("services")(services)


def services(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The part, or KIND:NAME. Default: list them.")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="Default: a free one.")] = None,
) -> None:
    """Run, on this machine and until Ctrl-C, the server that a store or channel needs, for development.

    Without NAME, list the services that installed parts offer.
    """
    from specforge_core.hooks.descriptors import resolve

    offered, problems = find_services(ctx.obj)
    if name is not None:
        resolve(choose(offered, problems, name).path)(port)
        return
    if port is not None:
        raise typer.BadParameter("it needs the NAME of a service", param_hint="--port")
    _print(offered)
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)


def find_services(registry: PluginRegistry) -> tuple[list[Service], list[PluginError]]:
    """What the installed stores and channels offer, sorted; and why some of them could not be asked."""
    parts: dict[Kind, Callable[[str], FeatureStoreSpec | RefChannelSpec]] = {
        "feature-store": registry.feature_store,
        "ref-channel": registry.ref_channel,
    }
    offered, problems = [], []
    for entry in registry.entries():
        if entry.kind not in parts or entry.status == "disabled":
            continue
        try:
            path = parts[entry.kind](entry.name).service
        except PluginError as error:
            problems.append(error)
            continue
        if path:
            offered.append(Service(entry.kind, entry.name, path, entry.source))
    return sorted(offered, key=lambda service: (service.name, service.kind)), problems


def choose(offered: list[Service], problems: list[PluginError], name: str) -> Service:
    """The one service that ``name`` means.

    :raises PluginError: there is none, or several; lists what there is.
    """
    found = [service for service in offered if name in (service.name, f"{service.kind}:{service.name}")]
    if len({service.path for service in found}) == 1:
        return found[0]
    listed = ", ".join(sorted({service.name for service in offered})) or "none"
    if found:
        names = " or ".join(f"{service.kind}:{service.name}" for service in found)
        raise PluginError(f"several parts offer a service {name!r}", hint=f"say {names}")
    why = "".join(f"; {problem.message}" for problem in problems)
    raise PluginError(f"no installed part offers a service {name!r} (offered: {listed}{why})", hint=_HOW)


def _print(offered: list[Service]) -> None:
    from specforge_core.cli.text_table import format_table

    if not offered:
        typer.echo("no installed part offers a service")
        return
    rows = [(service.name, service.kind, service.distribution) for service in offered]
    typer.echo(format_table(("NAME", "OF", "FROM"), rows))


_HOW = "`specforge services` lists them; parts that need no server offer none"
