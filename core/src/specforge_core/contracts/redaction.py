# SPDX-License-Identifier: Apache-2.0
"""Settings as text, without what is secret in them: for messages, logs, and files that a run leaves behind.

A password may stand in a URL, in its options, or under a key whose name says so; it must stay out also where the value
itself is refused, and so may be no URL at all. What might be a secret is hidden: a message loses little by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "…"
SHOWN_CHARACTERS = 60
"""Of a value in a message: enough to recognise it, and a line still fits on a terminal."""
SAID_CHARACTERS = 200
"""Of what a library, a file or somebody else says: the message stays a few lines whatever that is."""
_SHOWN_ITEMS, _SHOWN_LEVELS = 6, 3  # of lists and objects, so that a message shows what they are and not all they hold
_MESSAGE_CHARACTERS = 100_000
"""A longer message is cut: nobody reads it, and it may have been made long on purpose."""

_NAME = r"(?:pass(?:word|wd|phrase)?|pwd|secret|credentials?|(?:api|access|private|secret)[_-]?key|token)"
_NAMED = re.compile(rf"({_NAME}[\"']?\s*[:=]\s*)\S.*", re.IGNORECASE | re.DOTALL)
_SECRET_KEY = re.compile(rf"(?:.*[_-])?{_NAME}", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:[\w.-]*|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?")
_WORD, _SCHEME_END = re.compile(r"\S+"), re.compile(":/+")  # one slash: a path that was made of an address
_OPTION = re.compile(rf"([?&;][\w.-]*{_NAME}=)[^\s&;'\"]*", re.IGNORECASE)


def hide_secrets(value: str) -> str:
    """One setting as it may be shown: a URL without user, password and options, whether or not it is a valid one."""
    before, at, after = value.rpartition("@")
    scheme, separator, rest = (before if at else value).partition("://")
    if at:
        value = f"{scheme}{separator}{HIDDEN}@{after}" if separator else f"{HIDDEN}@{after}"
    elif separator and not _ADDRESS.fullmatch(re.split(r"[/?#]", rest, maxsplit=1)[0]):
        value = f"{scheme}://{HIDDEN}"
    if separator:
        value = re.sub(r"([?#]).+", rf"\1{HIDDEN}", value, flags=re.DOTALL)
    return _NAMED.sub(rf"\1{HIDDEN}", value)


def is_secret_name(key: str) -> bool:
    """Whether a setting of that name is a secret, as far as names tell."""
    return _SECRET_KEY.fullmatch(key) is not None


def show_value(value: object) -> str:
    """A value of any size as a short piece of a message, like ``repr``; takes time for the shown part only."""
    text = _shown(value, _SHOWN_LEVELS)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + HIDDEN


def _shown(value: object, levels: int) -> str:
    if isinstance(value, str):
        return repr(hide_secrets(value))
    if isinstance(value, (int, float, bool, type(None))):
        return repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a very large number"
    if not isinstance(value, (Mapping, list, tuple)):
        return f"a {type(value).__name__}"
    if not levels:
        return HIDDEN
    if isinstance(value, Mapping):
        items = [f"{_shown(key, 1)}: {_entry(key, value[key], levels)}" for key in list(value)[:_SHOWN_ITEMS]]
    else:
        items = [_shown(item, levels - 1) for item in value[:_SHOWN_ITEMS]]
    more = [HIDDEN] if len(value) > _SHOWN_ITEMS else []
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return f"{opening}{', '.join([*items, *more])}{closing}"


def _entry(key: object, value: object, levels: int) -> str:
    return HIDDEN if isinstance(key, str) and is_secret_name(key) else _shown(value, levels - 1)


def redact_message(message: str) -> str:
    """A whole message, in which a library may have quoted an address: without users, passwords and secret options."""
    if len(message) > _MESSAGE_CHARACTERS:
        message = message[:_MESSAGE_CHARACTERS] + HIDDEN
    return _OPTION.sub(rf"\1{HIDDEN}", _replace_users(message, f"{HIDDEN}@"))


def visible(message: str) -> str:
    """A message as a terminal may show it: what would move its cursor or turn its text around is spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in message)


def _replace_users(text: str, other: str) -> str:
    """What stands between ``://`` and the last ``@`` of a word, replaced; in time that grows with the text."""

    def replaced(word: re.Match[str]) -> str:
        before, at, after = word[0].rpartition("@")
        scheme = _SCHEME_END.search(before) if at else None
        return word[0] if scheme is None else f"{before[: scheme.end()]}{other}{after}"

    return _WORD.sub(replaced, text)


def without_secrets(value: Any) -> Any:
    """Settings as they may be kept in a file: no entry with a secret's name, no user and password in a URL."""
    if isinstance(value, str):
        return _OPTION.sub("", _replace_users(value, ""))
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items() if not is_secret_name(str(key))}
    return [without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value
