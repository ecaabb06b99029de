# SPDX-License-Identifier: Apache-2.0
"""Turns as files have them to messages as chat templates want them: roles, content, calls, and what is not trained.

A turn is {role, content} or {from, value}. Its other keys reach the template as they are; a key that is null is one
that the turn does not have. ``row_shapes`` finds the turns of a row, ``channels`` joins those of one answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import show_value
from specforge_core.prompts.reading.row_fields import THOUGHT_KEYS, check_value, from_text

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "function_response", "function_result"), "tool"),
}
"""Words for roles, in small letters, and the roles that templates know."""
_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_CONTROLS = ("weight", "train", "trainable", "loss")
_MAX_TURNS = 4096
"""Of one conversation: more than any target's context holds, each with its header."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_HINT = "a turn is {role, content} or {from, value}, its content text or text parts"


@dataclass(slots=True)
class Turn:
    """One message, and what the row says of it besides.

    :param trained: the row does not forbid it.
    :param where: the row and the message's place in it.
    """

    message: dict[str, Any]
    where: str
    trained: bool = True


@dataclass(slots=True)
class Turns:
    """Turns in order, and the keys of them that nothing was made of."""

    listed: list[Turn] = field(default_factory=list)
    unused: set[str] = field(default_factory=set)

    def extend(self, other: Turns) -> None:
        self.listed += other.listed
        self.unused |= other.unused

    @property
    def last_role(self) -> str:
        return str(self.listed[-1].message["role"]) if self.listed else ""


def text_turn(role: str, text: Any, where: str) -> Turns:
    """One turn of nothing but text, or text parts."""
    content = _parse_content(text, where, role)
    if content is None:
        raise DataError("is missing or not text", where=where, hint=_HINT)
    return Turns([Turn({"role": role, "content": content}, where)])


def parse_turns(value: Any, where: str, *, keys: Mapping[str, str] | None = None, places: Sequence[str] = ()) -> Turns:
    """The turns of a list (or of one as JSON text).

    :param keys: the turns' own names by ours, where they differ (``data.mapping``).
    :param places: where each stands, if not at ``where[index]``.
    :raises DataError: it is not a list of turns, or one of them is not understood.
    """
    value = from_text(value, where)
    if not isinstance(value, list) or not value:
        raise DataError("is not a list of turns, or empty", where=where, hint="at least one user and assistant turn")
    if len(value) > _MAX_TURNS:
        raise DataError(f"holds {len(value)} turns, {_MAX_TURNS} are the most", where=where, hint="split it")
    turns = Turns()
    for index, given in enumerate(value):
        place = places[index] if places else f"{where}[{index}]"
        if not isinstance(given, dict):
            raise DataError(f"is a {type(given).__name__}", where=place, hint=_HINT)
        turn = _plain_turn(given, place) if not keys else None
        turns.listed.append(turn or _parse_turn(given, place, keys or {}, turns.unused))
    return turns


def _plain_turn(given: Mapping[str, Any], where: str) -> Turn | None:
    """Most turns are a role and a text, and nothing has to be looked for in them."""
    if len(given) != 2:
        return None
    role, content = given.get("role") or given.get("from"), given.get("content") or given.get("value")
    if not isinstance(content, str) or not isinstance(role, str) or role in _CALL_ROLES or role not in ROLES:
        return None
    if not content.isascii():
        check_value(content, f"{where}.{'content' if 'content' in given else 'value'}")
    return Turn({"role": ROLES[role], "content": content}, where)


def _parse_turn(given: Mapping[str, Any], where: str, keys: Mapping[str, str], unused: set[str]) -> Turn:
    role_key, role, called = _read_role(given, where, keys)
    named = ["value", "content"] if role_key == "from" else ["content", "value"]
    named = [keys["content"]] if "content" in keys else named
    content_key = next((key for key in named if given.get(key) is not None), None)
    content_key = content_key or next((key for key in named if key in given), named[0])
    rest = {key: value for key, value in given.items() if value is not None and key not in (role_key, content_key)}
    for ours, theirs in keys.items():
        if theirs in rest:
            rest[ours] = rest.pop(theirs)
    trained = _read_controls(rest, role, where, unused)
    _read_calls(rest, where)
    check_value(rest, where)
    message: dict[str, Any] = {"role": role}
    if content_key in given:
        content = given[content_key]
        if called and isinstance(content, (dict, list)):
            content = json.dumps(content, ensure_ascii=False)
        message["content"] = _parse_content(content, f"{where}.{content_key}", role)
    if message.get("content") is None:
        _check_empty(rest, role, f"{where}.{content_key}", given=content_key in given)
    return Turn({**message, **rest}, where, trained)


def _read_role(given: Mapping[str, Any], where: str, keys: Mapping[str, str]) -> tuple[str, str, bool]:
    """The key that names it, the role, and whether the turn's content is a call."""
    named = [keys["role"]] if "role" in keys else ["role", "from"]
    key = next((key for key in named if given.get(key) is not None), None)
    if key is None:
        raise DataError("names no role", where=where, hint=_HINT)
    word = given[key]
    known = word.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(word, str) else ""
    if known not in ROLES:
        raise DataError(
            f"unknown role {show_value(word)}", where=f"{where}.{key}", hint=f"roles are {', '.join(ROLES)}"
        )
    return key, ROLES[known], known in _CALL_ROLES


def _read_controls(rest: dict[str, Any], role: str, where: str, unused: set[str]) -> bool:
    """Takes out what says whether to train the turn: that is for us, not for the template."""
    trained = True
    for key in _CONTROLS:
        if key not in rest:
            continue
        value = rest.pop(key)
        if role != "assistant":
            unused |= {f"messages[].{key}"} if value else set()
        elif not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"is {show_value(value)}, and neither 0 nor 1",
                where=f"{where}.{key}",
                hint="a turn is trained or not; leave the key out to train it",
            )
        else:
            trained = trained and bool(value)
    return trained


def _parse_content(content: Any, where: str, role: str) -> Any:
    """Text or text parts, as given; None where a turn may have none."""
    if isinstance(content, str):
        check_value(content, where)
        return content
    if isinstance(content, list):
        return [_parse_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    if content is not None:
        hint = _HINT if role != "tool" else "write what the tool returned as JSON text"
        raise DataError("is missing or not text", where=where, hint=hint)
    return None


def _parse_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise DataError(f"is a {type(part).__name__}", where=where, hint="a part of a text is {type: text, text: ...}")
    kind = part.get("type", "text" if isinstance(part.get("text"), str) else None)
    if kind not in _TEXT_PARTS:
        raise DataError(
            f"is a part of type {show_value(kind)}: only text is read",
            where=where,
            hint="leave out rows with pictures or sound; the target of this stage reads text",
        )
    if not isinstance(part.get("text"), str):
        raise DataError("is missing or not text", where=f"{where}.text", hint="a part is {type: text, text: ...}")
    check_value(part, where)
    return {"type": "text", **{key: value for key, value in part.items() if key != "type" and value is not None}}


def _check_empty(rest: Mapping[str, Any], role: str, where: str, *, given: bool) -> None:
    """A turn without content is one that calls or thinks, or a tool that returned nothing."""
    if role == "assistant" and any(rest.get(key) for key in ("tool_calls", "function_call", *THOUGHT_KEYS)):
        return
    if role == "assistant" and "channel" in rest:
        return
    if role != "tool" or not given:
        raise DataError("is missing or not text", where=where, hint=_HINT)


def _read_calls(rest: dict[str, Any], where: str) -> None:
    """Checks the calls of a turn; empty ones are none."""
    for key in ("tool_calls", "function_call"):
        if key in rest:
            rest[key] = from_text(rest[key], f"{where}.{key}")
            if not rest[key]:
                del rest[key]
    if "tool_calls" in rest:
        calls = rest["tool_calls"]
        if not isinstance(calls, list):
            raise DataError(f"is a {type(calls).__name__}", where=f"{where}.tool_calls", hint="a list of calls")
        for index, call in enumerate(calls):
            _check_call(call, f"{where}.tool_calls[{index}]")
    if "function_call" in rest:
        _check_call({"function": rest["function_call"]}, f"{where}.function_call", inner="")


def _check_call(call: Any, where: str, *, inner: str = ".function") -> None:
    hint = "a call is {type: function, function: {name, arguments}}"
    if not isinstance(call, dict):
        raise DataError(f"is a {type(call).__name__}", where=where, hint=hint)
    function = call.get("function")
    where += inner if function is not None else ""
    function = call if function is None else function
    if not isinstance(function, dict):
        raise DataError(f"is a {type(function).__name__}", where=where, hint=hint)
    if not isinstance(function.get("name"), str):
        raise DataError("is missing or not text", where=f"{where}.name", hint=hint)
    if not isinstance(function.get("arguments"), (str, dict, type(None))):
        raise DataError("is neither text nor an object", where=f"{where}.arguments", hint=hint)
