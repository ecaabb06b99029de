# SPDX-License-Identifier: Apache-2.0
"""Rows as people have them to ``SourceRow``: a conversation, rendered text with trained spans, or tokens with a mask.

This is the second step of the stage: ``sources`` gives raw rows, ``encoder`` takes what is made of them here. A row
that is not understood is an error that names file, row and key; whether the run ends there is not decided here.

Read, in this order: tokens (``input_ids`` with ``loss_mask``, ``labels`` or ``assistant_masks``; ``prompt_token_ids``
with ``token_ids``), ``text`` with ``spans``, ``messages`` or ``conversations`` (with ``choices``: a log of a chat API),
``prompt`` and ``completion`` or ``chosen``, ``instruction``, ``input`` and ``output``, ``question`` and ``answer``,
``query`` and ``response``. Beside them: ``id``, ``system``, ``tools``, ``functions``, ``chat_template_kwargs``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import Conversation, SourceRow
from specforge_core.prompts.reading.channels import join_channels
from specforge_core.prompts.reading.row_fields import CONVERSATION_KEYS, Fields, check_mapping, check_value, from_text
from specforge_core.prompts.reading.row_shapes import Exchange, find_turns, read_exchange
from specforge_core.prompts.reading.sources import find_files, read_records
from specforge_core.prompts.reading.token_rows import find_text, find_tokens, mask_missing
from specforge_core.prompts.reading.turns import Turns, text_turn

if TYPE_CHECKING:
    from specforge_core.config.run_config import HubSource
    from specforge_core.prompts.reading.raw_rows import Record
    from specforge_core.prompts.reading.sources import SourceFile

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why.

    :param where: file and row.
    """

    where: str
    error: DataError


def read_rows(
    sources: Sequence[Path | HubSource | SourceFile], mapping: Mapping[str, str] = _NOTHING
) -> Iterator[SourceRow | BadRow]:
    """Every row of every source, in order, with unique prompt ids.

    A given id is kept where it can be a file name; otherwise, and where none is given, the id is the source's name and
    the row's number, so that it is the same each time.

    :param sources: or their files, as ``find_files`` found them.
    :param mapping: the rows' own keys by ours.
    :raises DataError: a source is missing or empty or cannot be read on, or ``mapping`` names what is not read.
    """
    check_mapping(mapping)
    line_of: dict[str, tuple[int, int]] = {}
    files = find_files(sources)
    for index, file in enumerate(files):
        empty = True
        for count, record in enumerate(read_records(file, mapping)):
            empty = False
            where = f"{file.name}:{record.number}"
            try:
                row = parse_record(record, prompt_id=f"{file.label}-{count:05d}", where=where, mapping=mapping)
                _check_id(row, line_of, files)
            except DataError as error:
                yield BadRow(where, error)
                continue
            line_of[row.prompt_id] = (index, record.number)
            yield row
        if empty:
            raise DataError("holds no prompts", where=file.name, hint="one JSON object per line")


def parse_record(record: Record, *, prompt_id: str, where: str, mapping: Mapping[str, str]) -> SourceRow:
    """What a row of a file says; see ``parse_row``. :raises DataError: it cannot be read, or is not understood."""
    if record.error is not None:
        raise record.error
    row = parse_row(record.content, prompt_id=prompt_id, where=where, mapping=mapping)
    return replace(row, unused=row.unused | record.unread) if record.unread else row


def _check_id(row: SourceRow, line_of: Mapping[str, tuple[int, int]], files: Sequence[SourceFile]) -> None:
    if row.prompt_id in line_of:
        other, line = line_of[row.prompt_id]
        raise DataError(
            f"id {row.prompt_id!r} is also that of {files[other].name}:{line}",
            where=row.where,
            hint="ids must be unique over all files; leave them out to have them made",
        )


def parse_row(
    content: Mapping[str, Any], *, prompt_id: str, where: str, mapping: Mapping[str, str] = _NOTHING
) -> SourceRow:
    """What a row says.

    :param prompt_id: if the row has none that can be a file name.
    :param where: file and row, for errors.
    :param mapping: the row's own keys by ours.
    :raises DataError: it is not understood.
    """
    fields = Fields(content, where=where, mapping=mapping)
    given = fields.get("id")
    if isinstance(given, (str, int, float)) and _SAFE_ID.fullmatch(str(given)):
        prompt_id = str(given)
    exchange = read_exchange(fields)
    tokens = find_tokens(fields, exchange)
    if tokens is not None:
        checked = _talk(fields, exchange) if _has_listed(fields, exchange) else None
        return SourceRow(
            prompt_id,
            where,
            conversation=checked.conversation if checked is not None and checked.answered else None,
            input_ids=tokens[0],
            loss_mask=tokens[1],
            unused=frozenset(fields.unused() | exchange.unused | (checked.unused if checked is not None else set())),
        )
    text = find_text(fields)
    if text is not None:
        return SourceRow(prompt_id, where, text=text[0], spans=text[1], unused=frozenset(fields.unused()))
    talk = _talk(fields, exchange)
    if talk is None:
        raise _unknown(fields, mapping)
    unused = frozenset(fields.unused() | exchange.unused | talk.unused)
    return SourceRow(prompt_id, where, conversation=talk.conversation, cut_answers=talk.cut, unused=unused)


@dataclass(slots=True)
class _Talk:
    conversation: Conversation
    answered: bool
    cut: int
    unused: set[str]


def _has_listed(fields: Fields, exchange: Exchange) -> bool:
    listed = any(fields.peek(key) is not None for key in CONVERSATION_KEYS)
    return listed or exchange.asked.get("messages") is not None


def _talk(fields: Fields, exchange: Exchange) -> _Talk | None:
    """The row's conversation with all that belongs to it; None if there is none."""
    turns, cut = find_turns(fields, exchange)
    if turns is None:
        return None
    turns = join_channels(_with_system(turns, fields, exchange))
    conversation = Conversation(
        [turn.message for turn in turns.listed],
        tools=_read_tools(fields, exchange),
        untrained=frozenset(
            index for index, turn in enumerate(turns.listed) if not turn.trained and turn.message["role"] == "assistant"
        ),
        template_arguments=_read_arguments(fields, exchange),
    )
    return _Talk(conversation, turns.last_role == "assistant", cut, turns.unused)


def _with_system(turns: Turns, fields: Fields, exchange: Exchange) -> Turns:
    """The text of a ``system`` column goes first, unless the turns begin with one."""
    if turns.listed[0].message["role"] in ("system", "developer"):
        return turns
    for key in ("system", "system_prompt"):
        if fields.peek(key) is not None:
            given, place = fields.get(key), fields.place(key)
            break
    else:
        given, place = exchange.asked.get("system"), f"{exchange.asked_place}.system"
    if given is None or given == "":
        return turns
    first = text_turn("system", given, place)
    first.extend(turns)
    return first


def _from_row_or_call(fields: Fields, exchange: Exchange, key: str) -> tuple[Any, str]:
    if fields.peek(key) is not None:
        return from_text(fields.get(key), fields.place(key)), fields.place(key)
    if not exchange.asked:
        return None, ""
    place = f"{exchange.asked_place}.{key}"
    return from_text(exchange.asked.get(key), place), place


def _read_tools(fields: Fields, exchange: Exchange) -> list[Mapping[str, Any]] | None:
    tools, place = _from_row_or_call(fields, exchange, "tools")
    wrapped = False
    if not tools:
        tools, place = _from_row_or_call(fields, exchange, "functions")
        wrapped = True
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    hint = "tools are a list of {type: function, function: {name, description, parameters}}, or that as JSON text"
    if not isinstance(tools, list):
        raise DataError(f"is a {type(tools).__name__}", where=place, hint=hint)
    read: list[Mapping[str, Any]] = []
    for index, given in enumerate(tools):
        tool = from_text(given, f"{place}[{index}]")
        if not isinstance(tool, dict):
            raise DataError(f"is a {type(tool).__name__}", where=f"{place}[{index}]", hint=hint)
        check_value(tool, f"{place}[{index}]")
        read.append({"type": "function", "function": tool} if wrapped and "function" not in tool else tool)
    return read


def _read_arguments(fields: Fields, exchange: Exchange) -> Mapping[str, Any]:
    for key in ("chat_template_kwargs", "template_arguments"):
        given, place = _from_row_or_call(fields, exchange, key)
        if given is None:
            continue
        if not isinstance(given, dict):
            hint = "variables of the chat template, such as {enable_thinking: false}"
            raise DataError(f"is a {type(given).__name__}", where=place, hint=hint)
        check_value(given, place)
        return {key: value for key, value in given.items() if value is not None}
    return {}


def _unknown(fields: Fields, mapping: Mapping[str, str]) -> DataError:
    if fields.peek("input_ids") is not None:
        return mask_missing(fields)
    renamed = f" (data.mapping: {', '.join(f'{ours}: {theirs}' for ours, theirs in mapping.items())})"
    return DataError(
        f"has none of messages, conversations, prompt with completion, instruction with output, text with spans, "
        f"input_ids with loss_mask; its keys are {fields.names()}{renamed if mapping else ''}",
        where=fields.where,
        hint="a row is a conversation, a pair, or tokens with a mask; where its keys have other names, say so in "
        "data.mapping, such as {messages: dialogue}",
    )
