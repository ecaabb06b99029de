# SPDX-License-Identifier: Apache-2.0
"""What a target wrote, taken apart into thought, text and calls, where an engine gives tokens alone.

A thought is one where the prompt opened it, or where the answer begins with its mark; a call is one where tools were
offered. Whatever is not understood stays in the text, as the target wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from specforge_core.contracts.files import parse_json

_THOUGHT_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_SHOWN_OF_PROMPT = 64
"""Characters at the prompt's end in which a thought may be opened."""


def split_thought(text: str, *, prompt: str) -> tuple[str | None, str]:
    """The thought, if there is one, and the rest.

    :param prompt: the text that the answer goes on from.
    """
    tail = prompt[-_SHOWN_OF_PROMPT:]
    for opening, closing in _THOUGHT_MARKS:
        begun = text.lstrip().startswith(opening)
        if not begun and tail.rfind(opening) <= tail.rfind(closing):
            continue
        thought, found, rest = text.partition(closing)
        if begun:
            thought = thought.lstrip()[len(opening) :]
        return thought.strip("\n"), rest.lstrip("\n") if found else ""
    return None, text


def split_calls(text: str) -> tuple[str, list[Mapping[str, Any]]]:
    """The text before the calls, and the calls; all of it is text where one of them is not understood."""
    pieces = _CALL.findall(text)
    calls: list[Mapping[str, Any]] = []
    for index, piece in enumerate(pieces):
        try:
            call = parse_json(piece)
        except ValueError:
            return text, []
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return text, []
        arguments = call.get("arguments", call.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {"id": f"call_{index}", "type": "function", "function": {"name": call["name"], "arguments": arguments}}
        )
    return (text[: text.index("<tool_call>")].strip("\n"), calls) if calls else (text, [])
