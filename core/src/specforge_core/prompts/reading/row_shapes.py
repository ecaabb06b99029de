# SPDX-License-Identifier: Apache-2.0
"""The shapes in which files keep a conversation, each to its turns: lists of turns, logs of a chat API, pairs.

A log keeps the question in ``messages`` (or ``request``, ``body``) and the answer in ``choices`` (or ``response``):
the first choice is the answer, others are reported as not used. An answer that the server cut (``finish_reason``
length) would teach a draft to stop there, so it is not trained, and counted. Of prompt and completion the completion is
trained, whatever turns the prompt has. ``rows`` asks here; ``turns`` reads the single turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import show_value
from specforge_core.prompts.reading.row_fields import CONVERSATION_KEYS, PAIR_KEYS, THOUGHT_KEYS, Fields, from_text
from specforge_core.prompts.reading.turns import Turns, parse_turns, text_turn

_CUT = frozenset(("length", "max_tokens", "content_filter", "abort", "aborted", "error", "timeout"))


@dataclass(slots=True)
class Exchange:
    """What a logged call to a chat API was asked with and what it gave, with their places for errors.

    :param asked: the call's body, or {} where the row itself is one.
    :param given: the answer's body, or {} where the row itself is one.
    :param choice: the answer among its choices, or None.
    """

    asked: Mapping[str, Any] = field(default_factory=dict)
    asked_place: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] | None = None
    choice_place: str = ""
    unused: set[str] = field(default_factory=set)


def read_exchange(fields: Fields) -> Exchange:
    """:raises DataError: choices that are none, or a call that failed."""
    exchange = Exchange()
    for key in ("request", "body"):
        asked = from_text(fields.peek(key), fields.place(key))
        if isinstance(asked, dict):
            inner = asked.get("body")
            exchange.asked_place = fields.place(key) + (".body" if isinstance(inner, dict) else "")
            exchange.asked = inner if isinstance(inner, dict) else asked
            fields.use(key)
            break
    _read_response(fields, exchange)
    return exchange


def _read_response(fields: Fields, exchange: Exchange) -> None:
    choices, place = fields.peek("choices"), fields.place("choices")
    if choices is not None:
        fields.use("choices")
    response = fields.peek("response")
    if choices is None and isinstance(response, dict):
        fields.use("response")
        place = fields.place("response")
        status = response.get("status_code")
        if isinstance(status, int) and not 200 <= status < 300:
            raise DataError(f"is a failed call, status {status}", where=place, hint="leave failed calls out")
        inner = response.get("body")
        exchange.given = inner if isinstance(inner, dict) else response
        choices = exchange.given.get("choices")
        place += ".body.choices" if isinstance(inner, dict) else ".choices"
        if choices is None:
            message = exchange.given.get("message")
            exchange.choice = {"message": message if isinstance(message, dict) else exchange.given}
            exchange.choice_place = place.removesuffix(".choices")
            return
    if choices is None:
        return
    choices = from_text(choices, place)
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise DataError("is not a list of choices, or empty", where=place, hint="choices as the chat API gives them")
    if len(choices) > 1:
        exchange.unused.add("choices[1:]")
    exchange.choice, exchange.choice_place = choices[0], f"{place}[0]"


def find_turns(fields: Fields, exchange: Exchange) -> tuple[Turns | None, int]:
    """The row's conversation, or None if it has no shape of one; and how many of its answers the server cut.

    :raises DataError: it has one, which is not understood.
    """
    turns = find_listed(fields, exchange)
    if turns is None:
        turns = _find_pair(fields)
        return (None, 0) if turns is None else (turns, 0)
    cut = 0
    if exchange.choice is not None:
        cut = _add_choice(turns, exchange)
    elif turns.last_role != "assistant":
        key = next((key for key in ("response", "completion") if fields.peek(key) is not None), None)
        if key is not None:
            turns.extend(_piece(fields.get(key), fields.place(key), role="assistant"))
    return turns, cut


def find_listed(fields: Fields, exchange: Exchange) -> Turns | None:
    """The turns that the row, or the call in it, lists."""
    present = [key for key in CONVERSATION_KEYS if fields.peek(key) is not None]
    key = next((key for key in present if fields.peek(key)), present[0] if present else None)
    if key is not None:
        return parse_turns(fields.get(key), fields.place(key), keys=fields.turn_keys)
    if exchange.asked.get("messages") is not None:
        place = f"{exchange.asked_place}.messages"
        return parse_turns(exchange.asked["messages"], place, keys=fields.turn_keys)
    if exchange.choice is not None and fields.peek("prompt") is None:
        raise DataError(
            "has an answer, and not the messages it answers",
            where=fields.where,
            hint="put the request's messages into the row; rows of a batch and its results are joined by custom_id",
        )
    return None


def _add_choice(turns: Turns, exchange: Exchange) -> int:
    choice, place = exchange.choice or {}, exchange.choice_place
    message = choice.get("message")
    if not isinstance(message, dict):
        raise DataError(
            "is missing or no message",
            where=f"{place}.message",
            hint="only logs of the chat API are read; give others as prompt and completion",
        )
    kept = {key: value for key, value in message.items() if value not in (None, [], {}) or key == "content"}
    answer = parse_turns([{"role": "assistant", **kept}], place, places=[f"{place}.message"])
    reason = choice.get("finish_reason")
    cut = isinstance(reason, str) and reason.lower() in _CUT
    if cut:
        answer.listed[0].trained = False
    turns.extend(answer)
    return int(cut)


def _find_pair(fields: Fields) -> Turns | None:
    """A question and its answer, under any of their names."""
    for question, answers in PAIR_KEYS.items():
        answer = next((key for key in answers if fields.peek(key) is not None), None)
        if answer is None or fields.peek(question) is None or answer == question:
            continue
        if question == "instruction":
            return _instruction(fields, answer)
        return _ask_and_answer(fields, question, answer)
    if isinstance(fields.peek("chosen"), list):
        return parse_turns(fields.get("chosen"), fields.place("chosen"), keys=fields.turn_keys)
    return None


def _ask_and_answer(fields: Fields, question: str, answer: str) -> Turns:
    asked = _piece(fields.get(question), fields.place(question), role="user")
    answered = _piece(fields.get(answer), fields.place(answer), role="assistant")
    if answer == "chosen" and answered.listed[0].message["role"] != "assistant":
        return answered  # such files repeat the prompt in both answers
    for turn in asked.listed:
        turn.trained = turn.message["role"] != "assistant"
    _add_thought(answered, fields)
    asked.extend(answered)
    return asked


def _instruction(fields: Fields, answer: str) -> Turns:
    """The instruction, and below it what it is about, if the row has that."""
    turns = _history(fields)
    text, place = fields.get("instruction"), fields.place("instruction")
    about = next((key for key in ("input", "context") if fields.peek(key)), None)
    if about is not None and isinstance(text, str):
        given = fields.get(about)
        if not isinstance(given, str):
            raise DataError("is not text", where=fields.place(about), hint="instruction, input and output are text")
        text = f"{text}\n\n{given}"
    for key in ("input", "context"):
        if fields.peek(key) == "":
            fields.use(key)
    turns.extend(_piece(text, place, role="user"))
    answered = _piece(fields.get(answer), fields.place(answer), role="assistant")
    _add_thought(answered, fields)
    turns.extend(answered)
    return turns


def _history(fields: Fields) -> Turns:
    """Earlier rounds: pairs of question and answer."""
    turns, place = Turns(), fields.place("history")
    rounds = from_text(fields.get("history"), place) or []
    if not isinstance(rounds, list):
        raise DataError("is not a list of rounds", where=place, hint="history is [[question, answer], ...]")
    for index, pair in enumerate(rounds):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("is no round", where=f"{place}[{index}]", hint="history is [[question, answer], ...]")
        turns.extend(text_turn("user", pair[0], f"{place}[{index}][0]"))
        turns.extend(text_turn("assistant", pair[1], f"{place}[{index}][1]"))
    return turns


def _piece(value: Any, place: str, *, role: str) -> Turns:
    """Text as a turn of this role; or one turn; or a list of them."""
    if isinstance(value, str):
        return text_turn(role, value, place)
    if isinstance(value, dict):
        return parse_turns([{"role": role, **value}], place, places=[place])
    if isinstance(value, list):
        return parse_turns(value, place)
    raise DataError(f"is {show_value(value)}", where=place, hint="text, a turn, or a list of turns")


def _add_thought(answered: Turns, fields: Fields) -> None:
    """A column of thoughts belongs to the last answer."""
    key = next((key for key in THOUGHT_KEYS if isinstance(fields.peek(key), str)), None)
    message = answered.listed[-1].message
    if key is not None and message["role"] == "assistant" and key not in message:
        message[key] = fields.get(key)
