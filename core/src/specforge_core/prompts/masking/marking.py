# SPDX-License-Identifier: Apache-2.0
"""Marks around every text of a conversation, so that a rendering shows where each of them went.

A chat template is a program: what it made of a text cannot be found by searching for the text. So each text gets two
characters of Unicode's private planes, one before it and one after. Templates trim, join, split and escape texts, and
the marks go where the text goes. Without them the rendering must be the plain one, which is checked each time: where
a template looks at the ends of a text, the marks stand further inside (``Marking.INSIDE``) or not at all.
Used by ``rendering``, which asks the template; nothing here knows one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import Message

_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
_MOST_TEXTS = (_LAST_MARK - _FIRST_MARK) // 2
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")
CALL_KEYS = ("tool_calls", "function_call")
_CLOSES_THOUGHT = re.compile(r"\W*(/|end[_-]?)\W*\w*(think|thought|reason)", re.IGNORECASE)


class Marking(Enum):
    """Where marks stand, from the first that is tried to the last. Those within the whitespace around a text are for
    templates that trim it."""

    OUTSIDE = "around every text with its whitespace"
    ANSWERS_OUTSIDE = "as OUTSIDE for what the assistant wrote, else as AROUND"
    AROUND = "around every text, within its whitespace"
    NO_NAMES = "as AROUND, but not around the names of functions"
    INSIDE = "between the first two and the last two characters of contents and thoughts alone"


class Kind(Enum):
    """What a text is of its message."""

    CONTENT = "content"
    THOUGHT = "thought"
    CALL = "call"


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A piece of text of a message.

    :param inset: how many characters of ``text`` stand outside the marks, at either end.
    :param indented: whether whitespace stands before it in the message.
    """

    message: int
    kind: Kind
    text: str
    inset: int = 0
    indented: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text stands in a rendering: characters [start, end)."""

    start: int
    end: int
    text: MarkedText


class MarkedMessages:
    """A conversation's messages with marks, and what the marks mean.

    :param literals: texts that the template looks for in contents; they stay outside the marks.
    :raises DataError: there are too many texts.
    """

    def __init__(self, messages: Sequence[Message], *, literals: re.Pattern[str] | None, marking: Marking):
        self._literals = literals
        self._marking = marking
        self._outside = False
        self.texts: list[MarkedText] = []
        self.messages = [self._mark_message(index, message) for index, message in enumerate(messages)]

    def places(self, marked: str) -> tuple[str, list[Place]]:
        """A marked rendering without its marks, and where each text stands in it first, in order."""
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        pieces, last = [], 0
        for removed, found in enumerate(MARKS.finditer(marked)):
            position = found.start()
            pieces.append(marked[last:position])
            last = found.end()
            number, closes = divmod(ord(found.group()) - _FIRST_MARK, 2)
            if closes and number in starts:
                ends.setdefault(number, position - removed)
            elif not closes:
                starts.setdefault(number, position - removed)
        plain = "".join([*pieces, marked[last:]])
        places = [_place(self.texts[n], starts[n], end) for n, end in ends.items() if n < len(self.texts)]
        return plain, sorted(places, key=lambda place: (place.start, place.end))

    def _mark_message(self, index: int, message: Message) -> dict[str, Any]:
        marked = dict(message)
        answers = message.get("role") == "assistant" and self._marking is Marking.ANSWERS_OUTSIDE
        self._outside = answers or self._marking is Marking.OUTSIDE
        content = marked.get("content")
        if isinstance(content, str):
            marked["content"] = self._mark_pieces(index, content)
        elif content is not None:
            marked["content"] = self._mark_leaves(index, Kind.CONTENT, content)
        thought = next((marked[key] for key in THOUGHT_KEYS if isinstance(marked.get(key), str)), None)
        if thought is not None:  # under several names it is one thought, which a template reads under one of them
            shown = self._mark(index, Kind.THOUGHT, thought)
            marked |= {key: shown for key in THOUGHT_KEYS if marked.get(key) is not None}
        if self._marking is not Marking.INSIDE:
            for key in CALL_KEYS:
                if marked.get(key):
                    marked[key] = self._mark_leaves(index, Kind.CALL, marked[key])
        return marked

    def _mark_leaves(self, index: int, kind: Kind, value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            named = key in ("id", "type", "role", "index") or (key == "name" and self._marking is Marking.NO_NAMES)
            return value if named else self._mark(index, kind, value)
        if isinstance(value, Mapping):
            return {name: self._mark_leaves(index, kind, item, str(name)) for name, item in value.items()}
        if isinstance(value, list):
            return [self._mark_leaves(index, kind, item, key) for item in value]
        return value

    def _mark_pieces(self, index: int, content: str) -> str:
        """Content in pieces, between what the template looks for in it; before an end of thinking it is a thought."""
        found = list(self._literals.finditer(content)) if self._literals else []
        if not found:
            return self._mark(index, Kind.CONTENT, content)
        marked, position = [], 0
        for literal in found:
            kind = Kind.THOUGHT if _CLOSES_THOUGHT.match(literal.group()) else Kind.CONTENT
            marked += [self._mark(index, kind, content[position : literal.start()]), literal.group()]
            position = literal.end()
        return "".join([*marked, self._mark(index, Kind.CONTENT, content[position:])])

    def _mark(self, index: int, kind: Kind, text: str) -> str:
        core = text.strip()
        inset = 1 if self._marking is Marking.INSIDE and len(core) > 2 else 0
        if not core:
            return text
        if len(self.texts) >= _MOST_TEXTS:
            raise DataError(f"holds more than {_MOST_TEXTS} texts", where=f"messages[{index}]", hint="split it")
        before, _, after = text.partition(core) if not self._outside else ("", text, "")
        core = text if self._outside else core
        number = _FIRST_MARK + 2 * len(self.texts)
        self.texts.append(MarkedText(index, kind, core, inset, bool(before)))
        inner = core[inset : len(core) - inset]
        return f"{before}{core[:inset]}{chr(number)}{inner}{chr(number + 1)}{core[len(core) - inset :]}{after}"


def overlap(places: Sequence[Place]) -> bool:
    """Whether two texts stand at one place, which no rendering of turns one after the other does."""
    return any(before.end > after.start for before, after in pairwise(places))


def _place(text: MarkedText, start: int, end: int) -> Place:
    return Place(start - text.inset, end + text.inset, text)
