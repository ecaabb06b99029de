# SPDX-License-Identifier: Apache-2.0
"""Global options and the list of commands.

A command's module is imported when the command is chosen, so that ``--help`` and ``plugins`` stay quick and import no
torch. To add a command: a row in ``COMMANDS``, and a module beside this one whose ``register(app)`` adds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specforge_core.cli.environment import disabled_by_environment
from specforge_core.contracts.errors import PluginError
from specforge_core.contracts.redaction import redact_message, show_value

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init_command", "Write a commented run file for what is installed."),
    "plan": ("plan_command", "Compose a run: print what it would do, or everything that does not fit."),
    "data": ("data_commands", "Look at prompts and at what of them is trained."),
    "regenerate": ("regenerate_command", "Let the target answer a run's prompts itself."),
    "capture": ("run_commands", "Capture the target's features of the run's prompts."),
    "train": ("run_commands", "Train the run's draft on captured features."),
    "run": ("run_commands", "Capture and train."),
    "eval": ("measure_commands", "Evaluate a draft on held-out features."),
    "export": ("measure_commands", "Write the files a server loads."),
    "bench": ("measure_commands", "Measure speculative decoding against plain decoding."),
    "report": ("measure_commands", "Write an HTML page and pictures about a run."),
    "demo": ("demo_command", "The whole path on a small real target."),
    "plugins": ("plugins_command", "List, check and show installed plugins; write a new one."),
    "services": ("services_command", "Run the server that a store or channel needs, for development."),
    "schema": ("schema_command", "Print the run file's JSON schema, for editors."),
    "doctor": ("doctor_command", "Say what this machine and environment offer."),
}

EPILOG = """\b
From nothing to a measured draft:
  specforge demo
\b
A run of your own:
  specforge init run.yaml
  specforge plan run.yaml
  specforge run run.yaml training.epochs=2
  specforge bench runs/my-run
\b
Settle two plugins that offer one name:
  specforge --no-plugin some-distribution:name plan run.yaml
\b
Write a plugin, and look at it:
  specforge plugins new mine --kind strategy
  specforge plugins check mine
"""


_UsageError: Any = typer.BadParameter.__base__  # typer has it from click, or from a copy of its own


@contextmanager
def _without_secrets() -> Iterator[None]:
    """An argument that is not understood is quoted, and may hold a password: ``report RUN channel.url=…``."""
    try:
        yield
    except _UsageError as error:
        error.message = redact_message(error.message)
        raise


class LazyCommands(TyperGroup):
    """Lists ``COMMANDS`` without importing any of them."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _without_secrets():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _without_secrets():
                return super().invoke(ctx)
        except SystemExit as left:  # no command of ours does that: they raise typer.Exit
            raise PluginError(
                f"a plugin called sys.exit({show_value(left.code)}) before the command was done",
                hint="`specforge plugins` lists what is installed, `specforge plugins check` tries each",
            ) from left

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            from specforge_core.hooks.discovery import suggest

            ctx.fail(f"no such command {cmd_name!r}; {suggest(cmd_name, COMMANDS) or 'see specforge --help'}")
        module = importlib.import_module(f"specforge_core.cli.{COMMANDS[cmd_name][0]}")
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        app.callback()(_nothing)  # keeps it a group where a module adds a single command
        module.register(app)
        return typer.main.get_group(app).commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _nothing() -> None:
    pass


app = typer.Typer(
    cls=LazyCommands,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from specforge_core.hooks.discovery import core_version

        typer.echo(f"specforge {core_version()}")
        raise typer.Exit


@app.callback()
def specforge(
    ctx: typer.Context,
    no_plugin: Annotated[
        list[str] | None,
        typer.Option(
            "--no-plugin",
            metavar="NAME",
            help="Act as if a plugin were not installed: NAME, DISTRIBUTION, DISTRIBUTION:NAME or KIND:NAME. "
            "Repeatable; SPECFORGE_DISABLE_PLUGINS=a,b does the same.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train the draft models that make large language models decode faster."""
    disabled = [*(no_plugin or []), *disabled_by_environment()]
    if ctx.invoked_subcommand == "plugins":
        ctx.obj = disabled  # listing needs metadata alone: no pydantic, no pluggy
        return
    from specforge_core.hooks.manager import PluginRegistry

    ctx.obj = PluginRegistry.discover(disabled)
