# SPDX-License-Identifier: Apache-2.0
"""``a.b=c`` on the command line: one value of the run file, set for this command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specforge_core.config.document import parse_value
from specforge_core.contracts import ConfigError
from specforge_core.contracts.redaction import HIDDEN, SAID_CHARACTERS, hide_secrets


@dataclass(frozen=True, slots=True)
class Override:
    """Keys from the outermost section inwards, and the value as YAML reads it.

    :param text: the override as messages show it, without secrets.
    """

    keys: tuple[str, ...]
    value: Any
    text: str


def parse_override(text: str) -> Override:
    """Read ``section.key=value``.

    :raises ConfigError: it has no ``=``, an empty key, or a value that is not YAML.
    """
    dotted, equals, value = text.partition("=")
    shown = _show(dotted, equals, value)
    keys = tuple(key.strip() for key in dotted.split("."))
    if not equals or not all(keys):
        raise ConfigError("is not section.key=value", where=f"override {shown!r}", hint="e.g. training.epochs=2")
    try:
        return Override(keys, parse_value(value, where="")[0], shown)
    except ConfigError as error:
        hint = error.hint or "quote it as YAML, e.g. data.train='[a.jsonl, b.jsonl]'"
        raise ConfigError(f"its value: {error.message}", where=f"override {shown!r}", hint=hint) from None


def _show(dotted: str, equals: str, value: str) -> str:
    named = hide_secrets(f"{dotted.rpartition('.')[2]}={value}").partition("=")[2]  # a key's own name may tell a secret
    text = f"{hide_secrets(dotted)}{equals}{named if named.startswith(HIDDEN) else hide_secrets(value)}"
    return text if len(text) <= SAID_CHARACTERS else text[:SAID_CHARACTERS] + HIDDEN


def apply_override(values: dict[str, Any], override: Override) -> None:
    """Set the value in ``values``; sections that the file leaves out are added.

    :raises ConfigError: a key on the way holds a value, not a section.
    """
    section = values
    for depth, key in enumerate(override.keys[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            path = ".".join(override.keys[:depth])
            raise ConfigError(
                f"{path} holds a value, not a section", where=f"override {override.text!r}", hint=f"set {path}=… whole"
            )
    section[override.keys[-1]] = override.value
