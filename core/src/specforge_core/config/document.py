# SPDX-License-Identifier: Apache-2.0
"""YAML text to plain values and the line of every key. Knows nothing of what a run file means.

The text may be anybody's: a run file that was handed over, an override that was copied. So only text, numbers, true and
false, null, lists and mappings are read, whose keys are text; and what aliases stand for may not grow far beyond the
text itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from specforge_core.contracts import ConfigError
from specforge_core.contracts.redaction import SAID_CHARACTERS, hide_secrets, redact_message, show_value

Keys = tuple[str | int, ...]

MAX_BYTES = 1 << 20
"""The longest document: a run file has a few thousand bytes, and parsing this many takes some seconds."""
_MAX_EXPANDED = 4 * MAX_BYTES
"""Characters (and one for every value) of the document once each alias is spelt out: honest aliases save little."""
_MAX_LEVELS = 50
"""Of lists and mappings in one another, aliases spelt out: whoever walks a value may do so by recursion."""
_MAX_NUMBER_CHARACTERS = 64
"""No setting needs more; reading a number takes time that grows with the square of its length."""

_TAG = "tag:yaml.org,2002:"
_TEXT, _MERGE = f"{_TAG}str", f"{_TAG}merge"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
_SCALARS = (_TEXT, *_NUMBERS, f"{_TAG}bool", f"{_TAG}null")
_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters, halves of surrogate pairs, and what turns the direction of writing: they rewrite a terminal."""


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML mapping and the line of each of its keys, by the keys as text (line 1 is the first)."""

    values: dict[str, Any]
    lines: dict[tuple[str, ...], int]


def read_document(path: Path, content: bytes | None = None) -> Document:
    """Read one YAML mapping.

    :param content: of the file, where it was read already.
    :raises ConfigError: no such file, not text, not YAML, too much of it, not a mapping, a key that stands twice.
    """
    values, lines = parse_value(_decode(_read(path) if content is None else content, path), where=str(path))
    if values is None:
        raise ConfigError("is empty", where=str(path), hint="`specforge init` writes a run file to start from")
    if not isinstance(values, dict):
        raise ConfigError(
            f"holds a {type(values).__name__}, not sections such as `training:`",
            where=str(path),
            hint="`specforge init` writes a run file to start from",
        )
    return Document(values, lines)


def parse_value(text: str, *, where: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The value that YAML text stands for, and the line of every key in it.

    :param where: names the text in errors.
    :raises ConfigError: it is not YAML, or more or other than settings consist of.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        reader = _NodeReader(loader, where)
        reader.read(node, ())
        return loader.construct_document(node), reader.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = redact_message((error.problem or error.context or "cannot be read")[:SAID_CHARACTERS])
        raise ConfigError(f"not valid YAML: {problem}", where=f"{where}{line}") from None
    except yaml.YAMLError as error:
        problem = redact_message(str(error)[:SAID_CHARACTERS])
        raise ConfigError(f"not valid YAML: {problem}", where=where) from None
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deeply", where=where) from None
    except (ValueError, OverflowError) as error:  # an escape such as \\UFFFFFFFF that is no character
        raise ConfigError(f"not valid YAML: {error}", where=where) from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        hint = "`specforge init` writes a run file to start from"
        raise ConfigError("there is no such run file", where=str(path), hint=hint) from error
    except IsADirectoryError as error:
        raise ConfigError("is a directory, not a run file", where=str(path), hint="name the YAML file in it") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot be read: {reason}", where=str(path)) from error
    return content


def _decode(content: bytes, path: Path) -> str:
    if len(content) > MAX_BYTES:
        hint = "is it a run file? One has a few thousand bytes"
        raise ConfigError(f"is longer than {MAX_BYTES} bytes", where=str(path), hint=hint)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = "is it a YAML file? Save it as UTF-8"
        raise ConfigError(f"is not UTF-8 text (byte {error.start})", where=str(path), hint=hint) from error


@dataclass
class _NodeReader:
    """Walks a document before values are made of it. An aliased node is walked once and counted each time."""

    loader: yaml.SafeLoader
    where: str
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    _known: dict[int, tuple[int, int] | None] = field(default_factory=dict)

    def read(self, node: yaml.Node, keys: tuple[str, ...]) -> tuple[int, int]:
        """Size and levels of a node with its aliases spelt out; None in ``_known``: its walk is still going on.

        :raises ConfigError: it is too large, or holds what no setting is.
        """
        if id(node) in self._known:
            known = self._known[id(node)]
            if known is None:
                raise self._refuse(node, "an alias contains itself")
            return known
        self._known[id(node)] = None
        size, levels = 1, 0
        if isinstance(node, yaml.ScalarNode):
            size += len(node.value)
            self._check_scalar(node)
        else:
            self._check_tag(node, f"{_TAG}seq" if isinstance(node, yaml.SequenceNode) else f"{_TAG}map")
        for key, line, child in self._children(node):
            self.lines[(*keys, key)] = line
            child_size, child_levels = self.read(child, (*keys, key))
            size, levels = size + len(key) + child_size, max(levels, child_levels + 1)
            if size > _MAX_EXPANDED:
                hint = "write out what is meant"
                raise self._refuse(node, f"its aliases stand for more than {_MAX_EXPANDED} characters", hint)
            if levels > _MAX_LEVELS:
                raise self._refuse(node, "not valid YAML: nested too deeply")
        self._known[id(node)] = (size, levels)
        return size, levels

    def _children(self, node: yaml.Node) -> list[tuple[str, int, yaml.Node]]:
        if isinstance(node, yaml.SequenceNode):
            return [(str(index), child.start_mark.line + 1, child) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return []
        first: dict[str, int] = {}
        children: list[tuple[str, int, yaml.Node]] = []
        for key_node, child in node.value:
            key, line = self._read_key(key_node), key_node.start_mark.line + 1
            if key in first and key_node.tag != _MERGE:
                shown = show_value(key)
                raise self._refuse(
                    key_node, f"key {shown} stands twice, first in line {first[key]}", "keep one of them"
                )
            first[key] = line
            children.append((key, line, child))
        return children

    def _read_key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._refuse(node, "a list or mapping stands where a key belongs")
        if node.tag not in (_TEXT, _MERGE):
            raise self._refuse(node, f"key {hide_secrets(node.value[:SAID_CHARACTERS])} is not a string", "quote it")
        self._check_text(node)
        return str(node.value)

    def _check_scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag == f"{_TAG}timestamp":
            raise self._refuse(node, "not valid YAML here: a date", "put it into quotes if it is text")
        self._check_tag(node, *_SCALARS)
        self._check_text(node)
        if node.tag == _TEXT:
            return
        number = node.tag in _NUMBERS
        try:
            too_long = number and len(node.value) > _MAX_NUMBER_CHARACTERS
            value = None if too_long else self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError, OverflowError):  # `!!bool x` and the like
            raise self._refuse(node, f"not valid YAML: it is no {node.tag.removeprefix(_TAG)}") from None
        if too_long or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            raise self._refuse(node, "a number beyond 64 bits is no setting")

    def _check_tag(self, node: yaml.Node, *allowed: str) -> None:
        if node.tag not in allowed:
            tag = redact_message(str(node.tag)[:SAID_CHARACTERS].replace(_TAG, "!!"))
            raise self._refuse(node, f"not valid YAML: {tag!r} is not read here")

    def _check_text(self, node: yaml.ScalarNode) -> None:
        found = _NOT_TEXT.search(node.value)
        if found:
            raise self._refuse(node, f"a control character (U+{ord(found[0]):04X}) is no text")

    def _refuse(self, node: yaml.Node, problem: str, hint: str = "") -> ConfigError:
        return ConfigError(problem, where=f"{self.where} (line {node.start_mark.line + 1})", hint=hint)
