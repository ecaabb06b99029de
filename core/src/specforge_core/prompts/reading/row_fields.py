# SPDX-License-Identifier: Apache-2.0
"""A row's keys as the stage calls them, with a record of those that were used: the rest is reported, not dropped.

``data.mapping`` names, for a key of ours, the row's own; a dotted one leads into the objects below (``log.answer``,
``choices.0.message``). The steps that make something of a row (``rows``, ``row_shapes``, ``token_rows``) ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import MAX_JSON_DEPTH, parse_json
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value

CONVERSATION_KEYS = ("messages", "conversations", "conversation")
CHOICE_KEYS = ("choices", "response", "request", "body")
PAIR_KEYS = {
    "prompt": ("completion", "chosen", "response", "answer", "output"),
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "output", "completion"),
    "query": ("response", "answer", "output", "completion"),
    "input": ("output", "response", "answer", "completion"),
}
"""What a row calls its question, and what it may call the answer then."""
MASK_KEYS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask")
ANSWER_ID_KEYS = ("token_ids", "completion_token_ids", "output_token_ids", "output_ids")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
TURN_KEYS = ("role", "content", *THOUGHT_KEYS, "tool_calls", "function_call", "name", "tool_call_id")
ROW_KEYS = tuple(
    dict.fromkeys(
        (
            "id",
            *CONVERSATION_KEYS,
            *CHOICE_KEYS,
            *PAIR_KEYS,
            *(answer for answers in PAIR_KEYS.values() for answer in answers),
            *("context", "history", "system", "system_prompt", "tools", "functions"),
            *("chat_template_kwargs", "template_arguments", "text", "spans"),
            *("input_ids", "attention_mask", "labels", *MASK_KEYS, "prompt_token_ids", *ANSWER_ID_KEYS),
            *THOUGHT_KEYS,
        )
    )
)
"""Every key of a row that something may be made of, as the stage calls it."""
REGENERATION_KEY = "regeneration"
"""What ``regenerate`` says of how a row's answers were made; nothing is made of it here."""


def check_mapping(mapping: Mapping[str, str]) -> None:
    """:raises DataError: a key that the stage does not read."""
    for key in mapping:
        if key not in ROW_KEYS and key not in TURN_KEYS:
            raise DataError(
                f"{show_value(key)} is no key that rows are read by",
                where="data.mapping",
                hint=f"write OURS: THEIRS; ours are {', '.join([*ROW_KEYS, 'role', 'content'])}",
            )


class Fields:
    """One row.

    :param mapping: the row's own keys by ours; see ``check_mapping``.
    """

    def __init__(self, content: Mapping[str, Any], *, where: str, mapping: Mapping[str, str]) -> None:
        self.where = where
        self.turn_keys = {key: theirs for key, theirs in mapping.items() if key in TURN_KEYS}
        self._content = content
        self._mapping = {key: theirs for key, theirs in mapping.items() if key in ROW_KEYS}
        self._taken = set(self._mapping.values())
        self._used: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, which counts as used then; None if the row has none."""
        value = self.peek(key)
        if value is not None:
            self.use(key)
        return value

    def peek(self, key: str) -> Any:
        """The value, without a word of whether it is used."""
        if key in self._mapping:
            return _find(self._content, self._mapping[key])
        return None if key in self._taken else self._content.get(key)

    def use(self, key: str) -> None:
        theirs = self._mapping.get(key, key)
        self._used.add(theirs if theirs in self._content else theirs.partition(".")[0])

    def place(self, key: str) -> str:
        """Where a value of ours stands, for errors."""
        return f"{self.where}: {self._mapping.get(key, key)}"

    def unused(self) -> set[str]:
        known = {*self._used, REGENERATION_KEY}
        return {key for key, value in self._content.items() if value is not None and key not in known}

    def names(self) -> str:
        """The row's own keys, as a message shows them."""
        names = ", ".join(key if key.isprintable() else repr(key) for key in list(self._content)[:20]) or "none"
        return names if len(names) <= SAID_CHARACTERS else names[:SAID_CHARACTERS] + "…"


def _find(content: Mapping[str, Any], path: str) -> Any:
    if path in content:
        return content[path]
    value: Any = content
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal():
            value = value[int(step)] if int(step) < len(value) else None
        else:
            return None
    return value


def from_text(value: Any, where: str) -> Any:
    """The value of JSON text, as tables keep what their columns cannot hold; anything else as it is.

    :raises DataError: it begins like a list or an object, and is none.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(
            f"is text that is not JSON: {str(error)[:SAID_CHARACTERS]}", where=where, hint="a list or an object"
        ) from error


def check_value(value: Any, where: str, depth: int = 0) -> None:
    """:raises DataError: something in it cannot be written as text, or it is nested too deeply for a template."""
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value, where)
    elif isinstance(value, (dict, list)):
        if depth >= MAX_JSON_DEPTH:
            raise DataError("is nested too deeply", where=where, hint="a template cannot walk through it")
        for item in value:
            check_value(item, where, depth + 1)
            if isinstance(value, dict):
                check_value(value[item], where, depth + 1)


def _check_characters(value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "holds half of a surrogate pair", where=where, hint="the text was cut inside a character"
        ) from error
