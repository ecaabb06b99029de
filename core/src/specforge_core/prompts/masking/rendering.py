# SPDX-License-Identifier: Apache-2.0
"""One conversation through the chat template: as text, and where each of its own texts went.

A row is first rendered as it is given. Where the template fails on that, or leaves a text out, the same conversation
is given in the other ways in which templates want it (contents as parts or as text, calls as objects), and the first
way that renders most is taken. Between ``rows`` and ``answers``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specforge_core.contracts import ChatTokenizer, DataError
from specforge_core.prompts.conversation import Conversation, Message
from specforge_core.prompts.masking.marking import MARKS, Kind, MarkedMessages, MarkedText, Marking, Place, overlap
from specforge_core.prompts.masking.template_source import TemplateSource

MAX_TEXT_CHARACTERS = 6 << 20
"""Half as much again as the longest row (``sources``): to encode text takes some 130 bytes for each of its own."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text.

    :param messages: as the template got them.
    :param places: where their texts stand; None where the template looks into texts so that marks change its ways.
    :param marked: the template's own marks, as it gives them.
    :param arguments: variables of the template; ``own_arguments``: whether the row has some of its own.
    """

    text: str
    messages: Sequence[Message]
    places: Sequence[Place] | None
    marked: Sequence[tuple[int, int]] | None
    lost: Sequence[MarkedText]
    tools: Sequence[Mapping[str, Any]] | None
    arguments: Mapping[str, Any]
    own_arguments: bool
    marks: MarkedMessages | None


class TemplateRenderer:
    """Renders conversations with one tokenizer's template.

    :param arguments: variables of the template; a row's own win over them.
    :param date: what the template is told today is.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, arguments: Mapping[str, Any], date: datetime.date | None):
        self._tokenizer = tokenizer
        self._arguments = arguments
        self._date = date
        self.source = TemplateSource(tokenizer.template)

    def render(self, conversation: Conversation) -> Rendering:
        """:raises DataError: the template refuses the conversation in every form."""
        refused, best = None, None
        try:
            best = self._render_form(conversation, conversation.messages)
        except DataError as error:
            refused = error
        if best is not None and not _loss(best):
            return best
        for messages in _other_forms(conversation.messages):
            try:
                other = self._render_form(conversation, messages)
            except DataError:
                continue
            if best is None or _loss(other) < _loss(best):
                best = other
        if best is None:
            assert refused is not None
            raise refused
        return best

    def first_messages(
        self, rendering: Rendering, count: int, *, add_generation_prompt: bool
    ) -> tuple[str, Sequence[Place]]:
        """The first ``count`` messages of a rendered conversation alone, with the places of their texts.

        :raises DataError: the template refuses them.
        """
        assert rendering.marks is not None
        marked = self._ask(rendering.marks.messages[:count], rendering, add_generation_prompt=add_generation_prompt)
        return rendering.marks.places(marked)

    def plain(self, rendering: Rendering, count: int, *, add_generation_prompt: bool) -> str:
        """As :meth:`first_messages`, without marks."""
        return self._ask(rendering.messages[:count], rendering, add_generation_prompt=add_generation_prompt)

    def _render_form(self, conversation: Conversation, messages: Sequence[Message]) -> Rendering:
        arguments = {**self._arguments, **conversation.template_arguments}
        plain = self._tokenizer.render(
            messages, add_generation_prompt=False, tools=conversation.tools, arguments=arguments, date=self._date
        )
        if len(plain.text) > MAX_TEXT_CHARACTERS:
            raise DataError(
                f"the chat template makes {len(plain.text)} characters of it, {MAX_TEXT_CHARACTERS} are the most",
                hint="split the conversation: a prompt is cut at data.max_length tokens anyway",
            )
        if MARKS.search(plain.text):
            raise DataError(
                "holds characters of Unicode's private planes",
                hint="leave the row out, or give it as input_ids and loss_mask",
            )
        unmarked = Rendering(
            text=plain.text,
            messages=messages,
            places=None,
            marked=plain.marked,
            lost=(),
            tools=conversation.tools,
            arguments=arguments,
            own_arguments=bool(conversation.template_arguments),
            marks=None,
        )
        for marking in Marking:
            marks = MarkedMessages(messages, literals=self.source.literals, marking=marking)
            try:
                text, places = marks.places(self._ask(marks.messages, unmarked, add_generation_prompt=False))
            except DataError:  # the template looks into a text
                continue
            if text == plain.text and not overlap(places):
                found = {id(place.text) for place in places}
                lost = [text for text in marks.texts if id(text) not in found]
                return replace(unmarked, places=places, lost=lost, marks=marks)
        return unmarked

    def _ask(self, messages: Sequence[Message], like: Rendering, *, add_generation_prompt: bool) -> str:
        return self._tokenizer.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=like.tools,
            arguments=like.arguments,
            date=self._date,
        ).text


def _loss(rendering: Rendering) -> int:
    """How much of a conversation a rendering lacks or garbles. A thought may be left out: many templates do that."""
    if rendering.places is None:
        return 1 << 30
    lost = sum(text.kind is not Kind.THOUGHT for text in rendering.lost)
    listed = any(isinstance(message.get("content"), list) for message in rendering.messages)
    written = listed and "{'type': 'text'" in rendering.text  # parts, as Python writes them
    return lost + written + sum(_is_garbled(rendering, place) for place in rendering.places)


def _is_garbled(rendering: Rendering, place: Place) -> bool:
    """A call's JSON text that is quoted once more."""
    call = place.text.kind is Kind.CALL and place.text.text.startswith("{")
    return call and rendering.text[place.start : place.end].strip() != place.text.text


def _other_forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The same conversation in the other ways that templates want."""
    contents: tuple[Callable[[Message], Message], ...] = (_as_given, _as_text, _as_parts)
    calls: tuple[Callable[[Message], Message], ...] = (_as_given, _turn_calls, _turn_arguments)
    tried = [list(messages)]
    for turn_calls in calls:
        for turn_content in contents:
            made = [turn_content(turn_calls(message)) for message in messages]
            if made not in tried:
                tried.append(made)
                yield made


def _as_given(message: Message) -> Message:
    return message


def _as_text(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return {**message, "content": "".join(part["text"] for part in content)}
    return message


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _turn_calls(message: Message) -> Message:
    """Calls as ``tool_calls`` of functions, their arguments as objects."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    if not isinstance(calls, list):
        return message
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {**rest, "tool_calls": [_turn_call(call) for call in calls]}


def _turn_arguments(message: Message) -> Message:
    """Calls as ``tool_calls`` of functions, their arguments as JSON text."""
    turned = _turn_calls(message)
    calls = turned.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**turned, "tool_calls": [_write_arguments(call) for call in calls]}


def _write_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _turn_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    function: dict[str, Any] = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            function = {**function, "arguments": parsed}
    if "function" in call:
        return {**call, "function": function}
    return {"type": "function", "function": {key: function[key] for key in ("name", "arguments") if key in function}}
