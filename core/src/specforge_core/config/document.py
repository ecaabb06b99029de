# SPDX-License-Identifier: Apache-2.0
"""YAML text to plain values and the line of every key. Knows nothing of what a run file means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specforge_core.contracts import ConfigError

Keys = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML mapping and the line of each of its keys, by the keys as text (line 1 is the first)."""

    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]


def read_document(path: Path) -> Document:
    """Read one YAML mapping.

    :raises ConfigError: no such file, not text, not YAML, not a mapping, a key that stands twice.
    """
    text = _read_text(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = _read_lines(node, path) if node is not None else {}
        values = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = error.problem or error.context or "cannot be read"
        raise ConfigError(f"not valid YAML: {problem}", where=f"{path}{line}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=str(path)) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a date or number that is none
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"not valid YAML: {reason}", where=str(path)) from error
    if values is None:
        raise ConfigError("is empty", where=str(path), hint="`specforge init` writes a run file to start from")
    if not isinstance(values, dict):
        raise ConfigError(
            f"holds a {type(values).__name__}, not sections such as `training:`",
            where=str(path),
            hint="`specforge init` writes a run file to start from",
        )
    return Document(values, lines)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "`specforge init` writes a run file to start from"
        raise ConfigError("there is no such run file", where=str(path), hint=hint) from error
    except IsADirectoryError as error:
        raise ConfigError("is a directory, not a run file", where=str(path), hint="name the YAML file in it") from error
    except UnicodeDecodeError as error:
        hint = "is it a YAML file? Save it as UTF-8"
        raise ConfigError(f"is not UTF-8 text (byte {error.start})", where=str(path), hint=hint) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _read_lines(root: yaml.Node, path: Path) -> dict[tuple[str, ...], int]:
    """Line of every key. An aliased node is walked once, so that nested aliases cannot blow up.

    :raises ConfigError: a mapping holds a key twice, or an alias contains itself.
    """
    lines: dict[tuple[str, ...], int] = {}
    walked: set[int] = set()
    open_nodes: list[int] = []

    def walk(node: yaml.Node, keys: tuple[str, ...]) -> None:
        if id(node) in open_nodes:
            raise ConfigError("an alias contains itself", where=f"{path} (line {node.start_mark.line + 1})")
        if id(node) in walked:
            return
        walked.add(id(node))
        open_nodes.append(id(node))
        for key, line, child in _children(node, path):
            lines[(*keys, key)] = line
            walk(child, (*keys, key))
        open_nodes.pop()

    walk(root, ())
    return lines


def _children(node: yaml.Node, path: Path) -> list[tuple[str, int, yaml.Node]]:
    if isinstance(node, yaml.SequenceNode):
        return [(str(index), child.start_mark.line + 1, child) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return []
    first: dict[str, int] = {}
    children: list[tuple[str, int, yaml.Node]] = []
    for key_node, child in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in first and key != "<<":
            raise ConfigError(
                f"key {key!r} stands twice, first in line {first[key]}",
                where=f"{path} (line {line})",
                hint="keep one of them",
            )
        first[key] = line
        children.append((key, line, child))
    return children
