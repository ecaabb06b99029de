# SPDX-License-Identifier: Apache-2.0
"""Writes a new plugin's distribution from the templates beside this module.

Templates are files of the distribution with ``@WORD@`` where the plugin's own names go, and ``.tmpl`` at the end of
their names. What every kind has is in ``every-kind``; the rest in a folder per kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from packaging.version import Version

from specforge_core.contracts.errors import ConfigError, PluginError
from specforge_core.hooks.discovery import core_version, list_entries
from specforge_core.hooks.kinds import KINDS, PARTS, Kind

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".tmpl"
_PACKAGE_FOLDER = "__package__"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A distribution that was written.

    :param installed: distributions that offer the same name already; two cannot be used side by side.
    """

    distribution: str
    directory: Path
    files: tuple[Path, ...]
    installed: tuple[str, ...]


def write_skeleton(name: str, kind: Kind, directory: Path | None = None) -> Skeleton:
    """Write a distribution that offers the part ``name``.

    :param directory: where; default: the distribution's name, here.
    :raises PluginError: not a name that a part can have, or a kind without a template.
    :raises ConfigError: the directory holds something already, or cannot be written.
    """
    if kind not in PARTS:
        raise PluginError(f"{kind!r} is no kind that can be generated", hint=f"one of {', '.join(PARTS)}")
    if not _NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot name a part", hint="small letters, digits and single dashes, a letter first: my-part"
        )
    words = _words(name, kind)
    root = directory or Path(words["DISTRIBUTION"])
    installed = tuple(entry.source for entry in list_entries() if (entry.kind, entry.name) == (kind, name))
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ConfigError("is there already, and not empty", where=str(root), hint="say another --directory")
        written = [_write(root / place, text) for place, text in _render(kind, words)]
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(root)) from error
    return Skeleton(words["DISTRIBUTION"], root, tuple(sorted(written)), installed)


def _words(name: str, kind: Kind) -> dict[str, str]:
    """What each ``@WORD@`` of a template stands for."""
    distribution = KINDS[kind].distribution.format(name)
    core = Version(core_version())
    return {
        "NAME": name,
        "KIND": kind,
        "GROUP": KINDS[kind].group,
        "DISTRIBUTION": distribution,
        "PACKAGE": distribution.replace("-", "_"),
        "CLASS": "".join(part.capitalize() for part in name.split("-")),
        "CORE": f">={core},<{core.major}.{core.minor + 1}",
    }


def _render(kind: Kind, words: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Places in the distribution, and what goes there."""
    templates = files("specforge_core.cli") / "templates"
    for folder in ("every-kind", kind):
        for place, template in _walk(templates / folder, ""):
            text = re.sub("@([A-Z]+)@", lambda match: words[match[1]], template.read_text(encoding="utf-8"))
            yield place.replace(_PACKAGE_FOLDER, words["PACKAGE"]), text


def _walk(folder: Traversable, above: str) -> Iterator[tuple[str, Traversable]]:
    for item in folder.iterdir():
        if item.is_dir():
            yield from _walk(item, f"{above}{item.name}/")
        elif item.name.endswith(_SUFFIX):
            yield above + item.name.removesuffix(_SUFFIX), item


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
