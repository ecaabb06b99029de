# SPDX-License-Identifier: Apache-2.0
"""Bytes as a damaged disk or a hostile author would leave them: one seeded change to a file's content at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

ODD_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.5),
    *("", "x", "../x", "/etc/passwd", "\ud800", "a\x00b", "%", "{}", "9" * 400, "x" * 5000),
    *([], {}, [[]], {"": {}}, [None] * 50, {"__metadata__": 1}),
]
"""What stands in a field whose author did not mean well, or whose program was another."""

ODD_BYTES = [
    b"null",
    b"[" * 3000,
    b"]",
    b"9" * 40,
    b"-1",
    b"1e400",
    b'"\\ud800"',
    b"{",
    b"\n",
    b"\r",
    b"\x00" * 64,
    b"\xff",
]


def flip_a_bit(content: bytes, chance: Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(content: bytes, chance: Random) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def extend(content: bytes, chance: Random) -> bytes:
    return content + chance.choice([*ODD_BYTES, content[-40:], bytes(chance.randbytes(20))])


def drop_a_piece(content: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[at + chance.randrange(1, 30) :]


def double_a_piece(content: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + content[max(0, at - chance.randrange(1, 200)) :]


def insert(content: bytes, chance: Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.choice(ODD_BYTES) + content[at:]


def overwrite(content: bytes, chance: Random) -> bytes:
    odd, at = chance.choice(ODD_BYTES), chance.randrange(len(content) + 1)
    return content[:at] + odd + content[at + len(odd) :]


def change_json(value: Any, chance: Random) -> Any:
    """The value with one node of it replaced, removed, doubled or nested."""
    holder: list[Any] = [value]
    place: Any = holder
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and chance.random() < 0.85:
        place = place[key]
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
    kind = chance.randrange(5)
    if kind == 0 and place is not holder:
        del place[key]
    elif kind == 1:
        place[key] = [place[key]] * 2
    elif kind == 2:
        place[key] = {"x": place[key]}
    else:
        place[key] = chance.choice(ODD_VALUES)
    return holder[0]


def change_json_text(content: bytes, chance: Random) -> bytes:
    """Where the content is JSON, or lines of it, one node of it; else some bytes."""
    lines = content.split(b"\n")
    whole = content.lstrip()[:1] in (b"{", b"[") and content.rstrip()[-1:] in (b"}", b"]")
    for number in [-1] if whole else chance.sample(range(len(lines)), min(3, len(lines))):
        try:
            changed = json.dumps(change_json(json.loads(content if number < 0 else lines[number]), chance)).encode()
        except (ValueError, RecursionError):  # no JSON (any more), or an earlier change nested it too deeply
            continue
        return changed if number < 0 else b"\n".join([*lines[:number], changed, *lines[number + 1 :]])
    return flip_a_bit(content, chance)


DAMAGE: tuple[Mutation, ...] = (
    *(flip_a_bit, flip_a_bit, cut, extend, drop_a_piece, double_a_piece, insert, overwrite),
    *(change_json_text, change_json_text, change_json_text),
)


def damage(content: bytes, chance: Random) -> bytes:
    """One change, seldom two."""
    for _ in range(1 + (chance.random() < 0.2)):
        content = chance.choice(DAMAGE)(content, chance)
    return content
