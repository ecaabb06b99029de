# SPDX-License-Identifier: Apache-2.0
"""One conversation to token ids and loss mask: assistant content and its end-of-turn token are trained, headers not.

The template's own assistant mask is used where it has one. Otherwise the conversation is rendered once and encoded
once; assistant turns are located in the rendered text one after the other, and tokens that overlap them are trained.
Second step of the stage, between ``reader`` and ``prompt_set``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from specforge_core.contracts import ChatTokenizer, DataError
from specforge_core.prompts.turn_markers import TurnMarkers, find_turn_markers

Span = tuple[int, int]
_MAX_TEXT_CHARACTERS = 6 << 20
"""Half as much again as the longest row (``reader``): to encode text takes some 130 bytes for each of its own."""
_THINKING_ENDS = "</think>"


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one set of rules."""

    def __init__(self, tokenizer: ChatTokenizer, *, max_length: int, last_turn_only: bool = False):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._last_turn_only = last_turn_only

    @cached_property
    def _markers(self) -> TurnMarkers:
        return find_turn_markers(self._tokenizer)

    def encode(self, messages: Sequence[Mapping[str, str]], *, where: str) -> tuple[list[int], list[int]]:
        """Token ids and mask, cut at the right to ``max_length``.

        :param where: names the conversation in errors.
        :raises DataError: the template refuses the conversation, or an assistant turn cannot be found in what it wrote.
        """
        try:
            input_ids, mask = self._encode_whole(messages)
        except DataError as error:
            raise DataError(error.message, where=f"{where}: {error.where}".rstrip(": "), hint=error.hint) from error
        if self._last_turn_only:
            mask = _keep_last_run(mask)
        return input_ids[: self._max_length], mask[: self._max_length]

    def _encode_whole(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        marked = self._tokenizer.encode_with_assistant_mask(messages)
        if marked is not None:
            return list(marked[0]), [int(item) for item in marked[1]]
        text = self._tokenizer.render(messages, add_generation_prompt=False)
        if len(text) > _MAX_TEXT_CHARACTERS:
            raise DataError(
                f"the chat template makes {len(text)} characters of it, {_MAX_TEXT_CHARACTERS} are the most",
                hint="split the conversation: a prompt is cut at data.max_length tokens anyway",
            )
        spans = locate_turns(text, messages, self._markers)
        encoded = self._tokenizer.encode(text)
        return list(encoded.input_ids), _mask_of_spans(encoded.offsets, spans)


def locate_turns(text: str, messages: Sequence[Mapping[str, str]], markers: TurnMarkers) -> list[Span]:
    """Where in the rendered ``text`` each assistant turn stands: from the end of its header to after its end marker.

    Turns are looked for one after the other, past the text of every turn before, so a user who quotes a header or an
    answer fools nobody. Between header and content there may be what the template adds (a thinking block).

    :raises DataError: naming the turn that is not where it should be.
    """
    spans, position = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            position = _skip(text, message["content"], position, markers, index)
            continue
        span = _locate_answer(text, message["content"], position, markers)
        if span is None:
            raise DataError(
                "the chat template rewrites this answer, so its tokens cannot be told",
                where=f"messages[{index}]",
                hint="mark answers in the template with {% generation %}, or give input_ids and loss_mask",
            )
        spans.append(span)
        position = span[1]
    return spans


def _skip(text: str, content: str, position: int, markers: TurnMarkers, index: int) -> int:
    for wanted in (content, content.strip()):
        found = text.find(wanted, position)
        if found >= 0:
            return found + len(wanted)
    if markers.header in content:
        raise DataError(
            "the chat template rewrites this turn, so what follows it cannot be told",
            where=f"messages[{index}]",
            hint="mark answers in the template with {% generation %}, or give input_ids and loss_mask",
        )
    return position


def _locate_answer(text: str, content: str, position: int, markers: TurnMarkers) -> Span | None:
    header = text.find(markers.header, position)
    if header < 0:
        return None
    start = header + len(markers.header)
    for wanted in _renderings(content):
        found = text.find(wanted, start)
        if found < 0 or _leaves_the_turn(text[start:found], markers):
            continue
        end = text.find(markers.end, found + len(wanted))
        if end < 0:
            continue
        return start, end + len(markers.end)
    return None


def _renderings(content: str) -> list[str]:
    """What a template may have made of an answer: itself, stripped, or without its thinking block."""
    answer = content.rpartition(_THINKING_ENDS)[2]
    return [content, content.strip(), answer, answer.strip()]


def _leaves_the_turn(between: str, markers: TurnMarkers) -> bool:
    return markers.header in between or (bool(markers.end.strip()) and markers.end in between)


def _mask_of_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for every token that overlaps a span. Both are sorted; tokens of no width count with their neighbours."""
    mask, token = [0] * len(offsets), 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            mask[token] = 1
            token += 1
    return mask


def _keep_last_run(mask: Sequence[int]) -> list[int]:
    last = max((index for index, item in enumerate(mask) if item), default=-1)
    first = last
    while first > 0 and mask[first - 1]:
        first -= 1
    return [int(first <= index <= last) for index in range(len(mask))] if last >= 0 else [0] * len(mask)
