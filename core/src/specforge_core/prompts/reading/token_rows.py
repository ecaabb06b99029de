# SPDX-License-Identifier: Apache-2.0
"""Rows that are tokens or rendered text already: ids with a mask, ids as a server gave them, text with its spans.

What a server returns (``prompt_token_ids`` and the answer's ids) is the surest source of all: nothing is encoded
again. ``rows`` asks here first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import show_value
from specforge_core.prompts.reading.row_fields import ANSWER_ID_KEYS, MASK_KEYS, Fields, check_value, from_text
from specforge_core.prompts.reading.row_shapes import Exchange

Tokens = tuple[list[int], list[int]]
"""Ids and mask, of one length."""
UNTRAINED_LABEL = -100
"""What trainers write into ``labels`` where nothing is to be learnt."""
_HINT = "input_ids and loss_mask are lists of one length, the mask of 0 and 1"


def find_tokens(fields: Fields, exchange: Exchange) -> Tokens | None:
    """Token ids and mask, if the row has both.

    :raises DataError: they are malformed or of different lengths.
    """
    if fields.peek("input_ids") is not None:
        key = next((key for key in (*MASK_KEYS, "labels") if fields.peek(key) is not None), None)
        return None if key is None else _masked(fields, key)
    return _served(fields, exchange)


def mask_missing(fields: Fields) -> DataError:
    return DataError("is missing or not a list of 0 and 1", where=fields.place("loss_mask"), hint=_HINT)


def _masked(fields: Fields, key: str) -> Tokens:
    input_ids = _read_ids(fields.get("input_ids"), fields.place("input_ids"))
    place = fields.place(key)
    if key == "labels":
        mask = _mask_of_labels(fields.get(key), input_ids, place)
    else:
        mask = _read_mask(fields.get(key), len(input_ids), place)
    if fields.peek("attention_mask") is None:
        return input_ids, mask
    attended = _read_mask(fields.get("attention_mask"), len(input_ids), fields.place("attention_mask"))
    kept = [index for index, item in enumerate(attended) if item]
    return [input_ids[index] for index in kept], [mask[index] for index in kept]


def _read_ids(value: Any, place: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value) or min(value) < 0:
        raise DataError("is not a list of token ids", where=place, hint=_HINT)
    return value


def _read_mask(value: Any, length: int, place: str) -> list[int]:
    if not isinstance(value, list) or not all(item in (0, 1) for item in value):
        raise DataError("is missing or not a list of 0 and 1", where=place, hint=_HINT)
    if len(value) != length:
        raise DataError(f"has {len(value)} entries, input_ids {length}", where=place, hint=_HINT)
    return [int(item) for item in value]


def _mask_of_labels(labels: Any, input_ids: Sequence[int], place: str) -> list[int]:
    hint = f"labels repeat input_ids where they are trained, and are {UNTRAINED_LABEL} elsewhere"
    if not isinstance(labels, list) or not all(type(item) is int for item in labels):
        raise DataError("is not a list of token ids", where=place, hint=hint)
    if len(labels) != len(input_ids):
        raise DataError(f"has {len(labels)} entries, input_ids {len(input_ids)}", where=place, hint=hint)
    for index, (label, token_id) in enumerate(zip(labels, input_ids, strict=True)):
        if label not in (UNTRAINED_LABEL, token_id):
            raise DataError(
                f"is {show_value(label)} where input_ids has {token_id}", where=f"{place}[{index}]", hint=hint
            )
    return [int(label != UNTRAINED_LABEL) for label in labels]


def _served(fields: Fields, exchange: Exchange) -> Tokens | None:
    """The prompt's ids and the answer's, in the row, in the response, or in its choice."""
    choice, place = exchange.choice or {}, exchange.choice_place
    asked = fields.peek("prompt_token_ids")
    asked_place = fields.place("prompt_token_ids")
    for holder, at in ((exchange.given, fields.place("response")), (choice, place)):
        if asked is None and holder.get("prompt_token_ids") is not None:
            asked, asked_place = holder["prompt_token_ids"], f"{at}.prompt_token_ids"
    if asked is None:
        return None
    key = next((key for key in ANSWER_ID_KEYS if fields.peek(key) is not None), None)
    answer, answer_place = (None, place) if key is None else (fields.peek(key), fields.place(key))
    if key is None:
        inner = next((key for key in ANSWER_ID_KEYS if choice.get(key) is not None), "")
        answer, answer_place = choice.get(inner), f"{place}.{inner}"
    if answer is None:
        return None
    fields.get("prompt_token_ids")
    if key is not None:
        fields.use(key)
    prompt_ids, answer_ids = _read_ids(asked, asked_place), _read_ids(answer, answer_place)
    return prompt_ids + answer_ids, [0] * len(prompt_ids) + [1] * len(answer_ids)


def find_text(fields: Fields) -> tuple[str, list[tuple[int, int]]] | None:
    """Rendered text and the characters of it that are trained, if the row has both.

    :raises DataError: spans that are none, or that lie outside the text or in each other.
    """
    if fields.peek("text") is None or fields.peek("spans") is None:
        return None
    text, given = fields.get("text"), from_text(fields.get("spans"), fields.place("spans"))
    if not isinstance(text, str):
        raise DataError("is not text", where=fields.place("text"), hint="text is what the template renders")
    check_value(text, fields.place("text"))
    hint = "spans are [start, end] in characters of text, end not included, one after the other"
    if not isinstance(given, list):
        raise DataError("is not a list of spans", where=fields.place("spans"), hint=hint)
    spans: list[tuple[int, int]] = []
    for index, span in enumerate(given):
        place = f"{fields.place('spans')}[{index}]"
        if isinstance(span, dict):
            span = [span.get("start"), span.get("end")]
        if not isinstance(span, list) or len(span) != 2 or not all(type(edge) is int for edge in span):
            raise DataError("is not a span", where=place, hint=hint)
        start, end = span
        if not (spans[-1][1] if spans else 0) <= start < end <= len(text):
            raise DataError(
                f"is {show_value(span)}: outside the text of {len(text)} characters, empty, or out of order",
                where=place,
                hint=hint,
            )
        spans.append((start, end))
    return text, spans
