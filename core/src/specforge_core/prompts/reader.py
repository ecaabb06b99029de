# SPDX-License-Identifier: Apache-2.0
"""Reads prompts as users have them: JSONL files and Hugging Face datasets on disk, one row at a time.

A row is a conversation (``messages`` of role and content, or ShareGPT ``conversations`` of from and value) or tokens
(``input_ids`` and ``loss_mask``), with an optional ``id``. A row that is not understood is an error that names file,
line and key, never a skip. First step of the stage: rows go on to ``loss_mask`` and ``prompt_set``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import show_value
from specforge_core.prompts.dataset_rows import dataset_rows

Messages = Sequence[Mapping[str, str]]

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
MAX_ROW_BYTES = 4 << 20
"""Of one row: a million tokens, more than any target attends to. Encoding takes 130 bytes for each byte of text."""
_MAX_TURNS = 4096
"""Of one conversation: each is looked for in the whole text, so time grows with the square of their number."""
_SHOWN_CHARACTERS = 200
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TURN_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row: either ``messages``, or ``input_ids`` with their ``loss_mask``."""

    prompt_id: str
    where: str
    messages: Messages = ()
    input_ids: Sequence[int] = ()
    loss_mask: Sequence[int] = ()


def read_rows(sources: Sequence[Path]) -> Iterator[SourceRow]:
    """Every row of every source, in order, with unique prompt ids.

    A given id is kept where it can be a file name; otherwise, and where none is given, the id is the source's name and
    the row's number, so that it is the same each time.

    :raises DataError: a source is missing or empty, a row is not understood, or two rows have one id.
    """
    if not sources:
        raise DataError("no prompts are given", where="data", hint="name JSONL files or datasets on disk")
    line_of: dict[str, tuple[int, int]] = {}
    for index, (source, label) in enumerate(zip(sources, _labels(sources), strict=True)):
        number = -1
        for number, (line, content) in enumerate(_contents(source)):
            where = f"{source}:{line}"
            row = _parse_row(content, prompt_id=f"{label}-{number:05d}", where=where)
            if row.prompt_id in line_of:
                other, other_line = line_of[row.prompt_id]
                raise DataError(
                    f"id {row.prompt_id!r} is also that of {sources[other]}:{other_line}",
                    where=where,
                    hint="ids must be unique over all files; leave them out to have them made",
                )
            line_of[row.prompt_id] = (index, line)
            yield row
        if number < 0:
            raise DataError("holds no prompts", where=str(source), hint="one JSON object per line")


def _labels(sources: Sequence[Path]) -> list[str]:
    """A short name for each source; where two files have one name, the later ones are numbered."""
    labels: list[str] = []
    for source in sources:
        stem = re.sub(r"[^A-Za-z0-9_]+", "-", source.stem).strip("-")[:64] or "prompts"
        label, count = stem, 1
        while label in labels:
            count += 1
            label = f"{stem}.{count}"
        labels.append(label)
    return labels


def _contents(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line (or row) numbers, from 1, and objects."""
    if source.is_dir():
        yield from dataset_rows(source, most_values=MAX_ROW_BYTES)
    elif source.is_file():
        yield from _json_lines(source)
    else:
        raise DataError("there is no such file or directory", where=str(source), hint="correct the path under data")


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in read_lines(path):
        if line.strip():
            yield number, _parse_line(line, f"{path}:{number}")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and their numbers, from 1.

    :raises DataError: it cannot be read, or a line is longer than a row may be.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), hint="check its permissions") from error
    with file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise _too_long(f"{path}:{number}")
            yield number, line


def _too_long(where: str) -> DataError:
    return DataError(
        f"is longer than {MAX_ROW_BYTES} bytes",
        where=where,
        hint="one JSON object per line; split what is longer: a prompt is cut at data.max_length tokens anyway",
    )


def _parse_line(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", where=where, hint="convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:_SHOWN_CHARACTERS]
        raise DataError(f"is not JSON: {reason}", where=where, hint="one JSON object per line") from error
    if not isinstance(value, dict):
        raise DataError(f"is a JSON {type(value).__name__}", where=where, hint="one JSON object per line")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:raises ValueError: a key stands twice, so that it is not said which value counts."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"key {show_value(key)} stands twice")
        made[key] = value
    return made


def _parse_row(content: Mapping[str, Any], *, prompt_id: str, where: str) -> SourceRow:
    given = content.get("id")
    if isinstance(given, (str, int, float)) and _SAFE_ID.fullmatch(str(given)):
        prompt_id = str(given)
    if content.get("input_ids") is not None:
        input_ids, loss_mask = _parse_tokens(content, where)
        return SourceRow(prompt_id, where, input_ids=input_ids, loss_mask=loss_mask)
    for key in ("messages", "conversations"):
        if content.get(key) is not None:
            return SourceRow(prompt_id, where, messages=_parse_messages(content[key], f"{where}: {key}"))
    raise DataError(
        f"has none of messages, conversations, input_ids; its keys are {_names(content) or 'none'}",
        where=where,
        hint="a row is a conversation, or input_ids with loss_mask",
    )


def _names(content: Mapping[str, Any]) -> str:
    names = ", ".join(key if key.isprintable() else repr(key) for key in list(content)[:20])
    return names if len(names) <= _SHOWN_CHARACTERS else names[:_SHOWN_CHARACTERS] + "…"


def _parse_tokens(content: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    input_ids, loss_mask = content["input_ids"], content.get("loss_mask")
    hint = "input_ids and loss_mask are lists of one length, the mask of 0 and 1"
    if not _are_integers(input_ids) or not input_ids or min(input_ids) < 0:
        raise DataError("is not a list of token ids", where=f"{where}: input_ids", hint=hint)
    if not isinstance(loss_mask, list) or not all(item in (0, 1) for item in loss_mask):
        raise DataError("is missing or not a list of 0 and 1", where=f"{where}: loss_mask", hint=hint)
    if len(loss_mask) != len(input_ids):
        raise DataError(
            f"has {len(loss_mask)} entries, input_ids {len(input_ids)}", where=f"{where}: loss_mask", hint=hint
        )
    return input_ids, [int(item) for item in loss_mask]


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _parse_messages(value: object, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError("is not a list of turns, or empty", where=where, hint="at least one user and assistant turn")
    if len(value) > _MAX_TURNS:
        raise DataError(f"holds {len(value)} turns, {_MAX_TURNS} are the most", where=where, hint="split it")
    return [_parse_turn(turn, f"{where}[{index}]") for index, turn in enumerate(value)]


def _parse_turn(turn: object, where: str) -> Mapping[str, str]:
    hint = "a turn is {role, content} or {from, value}, both text"
    if not isinstance(turn, dict):
        raise DataError(f"is a {type(turn).__name__}", where=where, hint=hint)
    keys = next((keys for keys in _TURN_KEYS if turn.get(keys[0]) is not None), None)
    if keys is None:
        raise DataError("names no role", where=where, hint=hint)
    role_key, content_key = keys
    role, content = turn[role_key], turn.get(content_key)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"unknown role {show_value(role)}", where=f"{where}.{role_key}", hint=f"roles are {', '.join(ROLES)}"
        )
    if turn.get("tool_calls"):
        raise DataError("tool calls are not supported", where=f"{where}.tool_calls", hint="render them, give input_ids")
    _check_text(content, f"{where}.{content_key}", hint)
    parsed = {"role": ROLES[role], "content": str(content)}
    if turn.get("reasoning_content") is not None:
        _check_text(turn["reasoning_content"], f"{where}.reasoning_content", hint)
        parsed["reasoning_content"] = turn["reasoning_content"]
    return parsed


def _check_text(value: object, where: str, hint: str) -> None:
    if not isinstance(value, str):
        raise DataError("is missing or not text", where=where, hint=hint)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "holds half of a surrogate pair", where=where, hint="the text was cut inside a character"
        ) from error
