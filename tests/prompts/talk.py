# SPDX-License-Identifier: Apache-2.0
"""Conversations as the oracles see them, and what is known of each template of these tests.

An oracle is a function of a conversation that yields the text of the whole rendering in pieces: (text, trained). It is
written from what its template is to do, not from our code. ``None`` for trained: either is right. It raises ``Refused``
where the template does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TEMPLATES = Path(__file__).parent / "templates"
DATE = (2024, 2, 29)

Piece = tuple[str, bool | None]
NO, YES, EITHER = False, True, None


class Refused(Exception):
    """The template raises on this conversation."""


@dataclass(frozen=True)
class Call:
    name: str
    arguments: Mapping[str, Any]
    call_id: str = "call00001"

    @property
    def json(self) -> str:
        return dumps(self.arguments)


@dataclass(frozen=True)
class Message:
    role: str
    content: str = ""
    thought: str = ""
    calls: Sequence[Call] = ()
    name: str = ""
    call_id: str = ""

    @property
    def answers(self) -> bool:
        return self.role == "assistant"


@dataclass(frozen=True)
class Talk:
    """One conversation.

    :param form: how its contents are given, and ``calls_as``: how the arguments of calls are.
    :param none: whether the content of a turn of calls alone is null.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    form: Literal["text", "parts"] = "text"
    calls_as: Literal["object", "text"] = "object"
    none: bool = False

    def rows(self, *, form: str = "", calls_as: str = "") -> list[dict[str, Any]]:
        """Its messages as a row has them, or as a template wants them."""
        rows = [_row(message, form or self.form, calls_as or self.calls_as) for message in self.messages]
        for row in rows if self.none else ():
            if "tool_calls" in row and row["content"] in ("", [{"type": "text", "text": ""}]):
                row["content"] = None
        return rows


def _row(message: Message, form: str, calls_as: str) -> dict[str, Any]:
    text = message.content
    row: dict[str, Any] = {
        "role": message.role,
        "content": text if form == "text" else [{"type": "text", "text": text}],
    }
    if message.thought:
        row["reasoning_content"] = message.thought
    if message.calls:
        row["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.json if calls_as == "text" else dict(call.arguments),
                },
            }
            for call in message.calls
        ]
    if message.name:
        row["name"] = message.name
    if message.call_id:
        row["tool_call_id"] = message.call_id
    return row


Oracle = Callable[[Talk], Iterable[Piece]]


@dataclass(frozen=True, eq=False)
class Template:
    """A template, its oracle, and what conversations it is given.

    :param special: its special tokens; the first of ``stops`` is the tokenizer's end token.
    :param order: ``any``: turns in any order are rendered; ``turns``: only user and assistant in turn are tried.
    :param content: the form in which it wants contents; "" for both. ``calls_as`` likewise.
    :param none: whether it renders a content that is null as nothing.
    :param arguments: template variables, one set of which is given with each conversation.
    :param quoting: whether contents may quote its special tokens.
    """

    name: str
    pieces: Oracle
    special: tuple[str, ...]
    stops: tuple[str, ...]
    bos: str = ""
    system: bool = True
    developer: bool = False
    thoughts: bool = False
    thoughts_in_content: bool = False
    tools: bool = False
    most_calls: int = 2
    none: bool = False
    order: Literal["any", "turns"] = "any"
    content: str = "text"
    calls_as: str = "object"
    arguments: Sequence[Mapping[str, Any]] = ({},)
    quoting: bool = True
    needs_eos: bool = False
    files: Mapping[str, str] = field(default_factory=dict)

    def source(self) -> str | dict[str, str]:
        """The template's text, or its texts by name."""
        if self.files:
            return {key: _read(name) for key, name in self.files.items()}
        return _read(self.name)


def _read(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


TABLE: dict[str, Template] = {}


def template(special: str, stops: str = "", **known: Any) -> Callable[[Oracle], Oracle]:
    """Registers the oracle below it for the template of the same name.

    :param special: special tokens, separated by spaces; ``stops``: those that end an answer when it is served.
    """

    def register(oracle: Oracle) -> Oracle:
        name = oracle.__name__
        assert name not in TABLE
        TABLE[name] = Template(name, oracle, tuple(special.split()), tuple(stops.split()), **known)
        return oracle

    return register


def dumps(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def refuse_unless_in_turn(messages: Sequence[Message]) -> None:
    """:raises Refused: not user, assistant, user, assistant ..."""
    for index, message in enumerate(messages):
        if (message.role == "user") != (index % 2 == 0):
            raise Refused("roles must alternate")


def hoisted(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The text of a system message that begins the conversation, and the others."""
    if messages and messages[0].role == "system":
        return messages[0].content, messages[1:]
    return "", messages


def headerless(talk: Talk, index: int) -> bool | None:
    """Whether an answer is trained that the template gives no header of its own.

    It is after a question, and later where it says anything. Before the first question either is right: it answers
    nothing. So is either of an answer that is no text at all and does not stand after a question.
    """
    before = talk.messages[:index]
    message = talk.messages[index]
    if not any(earlier.role == "user" for earlier in before):
        return EITHER
    says = message.content.strip() or message.calls
    return YES if says or before[-1].role == "user" else EITHER


def neighbours(messages: Sequence[Message]) -> Iterator[tuple[str, Message, str]]:
    """Each message with the roles before and after it."""
    roles = ["", *(message.role for message in messages), ""]
    for index, message in enumerate(messages, 1):
        yield roles[index - 1], message, roles[index + 1]


def runs(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces without empty ones, neighbours of a kind joined."""
    text, kind = "", None
    for piece, trained in pieces:
        if piece and text and trained is kind:
            text += piece
        elif piece:
            if text:
                yield text, kind
            text, kind = piece, trained
    if text:
        yield text, kind
