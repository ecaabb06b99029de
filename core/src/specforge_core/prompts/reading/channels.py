# SPDX-License-Identifier: Apache-2.0
"""Messages that carry a ``channel`` each, joined to one assistant turn: its thought, its calls, its answer.

Formats with channels keep one message for each piece of a turn: ``analysis`` is the thought, ``commentary`` with a
recipient a call and without one a word beforehand, ``final`` the answer. Templates want one message with
``reasoning_content``, ``tool_calls`` and ``content``. A turn ends with its answer or before somebody else's message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import parse_json
from specforge_core.contracts.redaction import show_value
from specforge_core.prompts.reading.turns import Turn, Turns

_CHANNELS = ("analysis", "commentary", "final")
_OURS = frozenset(("role", "content", "channel", "recipient", "content_type"))


def join_channels(turns: Turns) -> Turns:
    """The same turns, those of one assistant turn joined.

    :raises DataError: an unknown channel, or pieces of one turn of which some are trained and some not.
    """
    if not any("channel" in turn.message for turn in turns.listed):
        return turns
    joined = Turns(unused=turns.unused)
    pieces: list[Turn] = []
    for turn in turns.listed:
        if turn.message["role"] != "assistant":
            turn.message.pop("channel", None)
        piece = "channel" in turn.message
        if pieces and not piece:
            joined.listed.append(_join(pieces, joined.unused))
            pieces = []
        if not piece:
            joined.listed.append(turn)
            continue
        pieces.append(turn)
        if turn.message["channel"] == "final":
            joined.listed.append(_join(pieces, joined.unused))
            pieces = []
    if pieces:
        joined.listed.append(_join(pieces, joined.unused))
    return joined


def _join(pieces: Sequence[Turn], unused: set[str]) -> Turn:
    first = pieces[0]
    if len({piece.trained for piece in pieces}) > 1:
        raise DataError(
            "is one turn with the messages after it, of which some are trained and some not",
            where=first.where,
            hint="give all channels of a turn the same weight",
        )
    thoughts: list[str] = []
    said: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        message = piece.message
        unused |= {f"messages[].{key}" for key in message if key not in _OURS}
        text = _text_of(message.get("content"))
        if message["channel"] not in _CHANNELS:
            raise DataError(
                f"unknown channel {show_value(message['channel'])}",
                where=f"{piece.where}.channel",
                hint=f"channels are {', '.join(_CHANNELS)}",
            )
        if message.get("recipient") not in (None, "all", "user"):
            calls.append(_call(str(message["recipient"]), text))
        elif message["channel"] == "analysis":
            thoughts.append(text)
        else:
            said.append(text)
    whole: dict[str, Any] = {"role": "assistant", "content": "\n".join(said)}
    if thoughts:
        whole["reasoning_content"] = "\n".join(thoughts)
    if calls:
        whole["tool_calls"] = calls
    return Turn(whole, first.where, first.trained)


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _call(recipient: str, arguments: str) -> dict[str, Any]:
    """Arguments as an object, as templates want them, where the text is one."""
    try:
        parsed = parse_json(arguments)
    except ValueError:
        parsed = arguments
    function = {"name": recipient.removeprefix("functions."), "arguments": parsed}
    if not isinstance(parsed, dict):
        function["arguments"] = arguments
    return {"type": "function", "function": function}
