# SPDX-License-Identifier: Apache-2.0
"""``init``: a commented run file to start from, with the parts that are installed and every setting they have."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from specforge_core.hooks.kinds import Kind
    from specforge_core.hooks.manager import PluginRegistry

_HEAD = """\
# A SpecForge run. `specforge plan {path}` says what it would do; `specforge run {path}` does it.
# Commented settings show their defaults. Relative paths are relative to where the command is run.

run:
  directory: runs/{stem}
  # seed: 0

# offline: capture first, then train any number of epochs. colocated: both at once in one process.
topology: offline

"""

_DATA = """\
data:
  train: [train.jsonl]    # {"messages": [{"role": "user", "content": "..."}, ...]} on each line
  # eval: [eval.jsonl]    # held-out prompts; bench and eval need them
"""

_LATER = ("capture", "training", "loading", "checkpoint", "evaluation", "bench")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(init)


def init(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented run file to start from, with the parts that are installed.

    Example: specforge init my-run.yaml
    """
    from specforge_core.contracts import ConfigError

    text = write_starter(ctx.obj, path)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with open(os.open(path, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError("is there already", where=str(path), hint="name another file, or say --force") from error
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path)) from error
    typer.echo(f"wrote {path}; next: edit it, then specforge plan {path}")


def write_starter(registry: PluginRegistry, path: Path) -> str:
    """The text of a run file whose name will be ``path``."""
    from specforge_core.config.run_config import DataSection, RunConfig

    text = _HEAD.format(path=path, stem=path.stem)
    text += _part(registry, "target-engine") + _part(registry, "strategy")
    text += _DATA + _settings(DataSection, skip=("train", "eval")) + "\n"
    for name in _LATER:
        model: Any = RunConfig.model_fields[name].annotation
        text += f"# {name}:\n{_settings(model)}\n"
    return text


def _part(registry: PluginRegistry, kind: Kind) -> str:
    from specforge_core.hooks.kinds import KINDS

    key = KINDS[kind].section
    names = registry.names(kind)
    if not names:
        return f"{key}:\n  name: CHANGE-ME    # no {kind} is installed; pip install one, then `specforge plugins`\n\n"
    others = f"    # installed: {', '.join(names)}" if len(names) > 1 else ""
    spec = registry.part(kind, names[0])
    return f"{key}:    # {spec.summary}\n  name: {names[0]}{others}\n{_settings(spec.config, skip=('name',))}\n"


def _settings(model: type[BaseModel], skip: tuple[str, ...] = ()) -> str:
    lines = [_setting(name, field) for name, field in model.model_fields.items() if name not in skip]
    return "".join(f"{line}\n" for line in lines)


def _setting(name: str, field: FieldInfo) -> str:
    comment = f"    # {field.description}" if field.description else ""
    if field.is_required():
        return f"  {name}: CHANGE-ME{comment}"
    default = field.get_default(call_default_factory=True)
    return f"  # {name}: {json.dumps(default, default=str)}{comment}"
