# SPDX-License-Identifier: Apache-2.0
"""What a field of a file that somebody else may have written may hold: kinds, of which readers make tables."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value.

    :param words: the same for people: "… is not WORDS".
    """

    words: str
    accepts: Callable[[Any], bool]


FLAG = Kind("true or false", lambda value: type(value) is bool)
OBJECT = Kind("an object", lambda value: type(value) is dict)
TEXT = Kind("a text", lambda value: type(value) is str)


def whole_number(least: int, most: int) -> Kind:
    """An integer between two bounds, both included."""
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def number(least: float, most: float) -> Kind:
    """A number between two bounds, both included; never NaN."""
    return Kind(
        f"a number from {least:g} to {most:g}", lambda value: type(value) in (int, float) and least <= value <= most
    )


def or_null(kind: Kind) -> Kind:
    """That, or null."""
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.accepts(value))


def list_of(entry: Kind, *, least: int = 0, most: int) -> Kind:
    """A list of so many entries."""
    return Kind(
        f"a list of {least} to {most} entries, each {entry.words}",
        lambda value: type(value) is list and least <= len(value) <= most and all(map(entry.accepts, value)),
    )


def object_of(kinds: Mapping[str, Kind]) -> Kind:
    """An object that has at least these keys."""
    words = ", ".join(f"{key} ({kind.words})" for key, kind in kinds.items())
    return Kind(
        f"an object with {words}",
        lambda value: type(value) is dict and all(key in value and kinds[key].accepts(value[key]) for key in kinds),
    )


def find_wrong(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[str, str] | None:
    """The first key of ``kinds`` whose value is of another kind, and what is wrong with it; a missing key is not."""
    for key, kind in kinds.items():
        if key in values and not kind.accepts(values[key]):
            return key, f"{shorten(values[key])} is not {kind.words}"
    return None


def shorten(value: object) -> str:
    """A value from a file as a message shows it: whatever it is, a few words."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200  # a path; the default cuts it to thirty characters
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist = 3, 12, 12  # more than any section of ours has
