# SPDX-License-Identifier: Apache-2.0
"""One conversation to token ids and loss mask: what the target itself would write is trained, and nothing else.

The conversation is rendered once and encoded once. Its answers are found by taking the turns apart (``answers``); where
the template marks them itself, its marks are used if they agree with that. Tokens that overlap a trained span are
trained. Last step before ``prepare``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from specforge_core.contracts import ChatTokenizer, DataError
from specforge_core.prompts.conversation import Conversation, EncodedPrompt
from specforge_core.prompts.masking.answers import Span, Turn, TurnLocator
from specforge_core.prompts.masking.marking import CALL_KEYS, Kind
from specforge_core.prompts.masking.rendering import Rendering, TemplateRenderer
from specforge_core.prompts.masking.turn_ends import TurnEnds

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection

_log = logging.getLogger(__name__)


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one set of rules.

    :param settings: ``max_length``, ``samples``, ``last_turn_only``, ``template_arguments`` and ``date`` are used.
    """

    def __init__(self, tokenizer: ChatTokenizer, settings: DataSection):
        self._tokenizer = tokenizer
        self._settings = settings
        self._renderer = TemplateRenderer(tokenizer, arguments=settings.template_arguments, date=settings.date)
        self._stops = tokenizer.stop_token_ids
        self._warned: set[str] = set()

    @cached_property
    def _locator(self) -> TurnLocator:
        return TurnLocator(self._renderer, TurnEnds(self._tokenizer, self._renderer))

    def encode(self, conversation: Conversation, *, where: str) -> list[EncodedPrompt]:
        """One sample, or one for each answer (``samples: turn``), each cut at the right to ``max_length``.

        :param where: names the conversation in errors.
        :raises DataError: the template refuses the conversation, or what it made of it cannot be told apart.
        """
        try:
            if self._settings.samples == "conversation":
                return [self._encode(conversation)]
            return [self._encode(_up_to(conversation, index)) for index in _answers(conversation)]
        except DataError as error:
            raise DataError(error.message, where=f"{where}: {error.where}".rstrip(": "), hint=error.hint) from error

    def encode_text(self, text: str, spans: Sequence[Span]) -> EncodedPrompt:
        """Rendered text whose trained characters are given."""
        return self._encode_spans(text, [(start, end, False) for start, end in sorted(spans)], Counter())

    def _encode(self, conversation: Conversation) -> EncodedPrompt:
        rendering = self._renderer.render(conversation)
        counts: Counter[str] = Counter()
        _count_texts(rendering, counts, names_tools="tools" in self._renderer.source.names)
        turns = self._choose(self._locator.locate(rendering), conversation, counts)
        spans = [(turn.start, turn.end) for turn in turns if turn.start is not None]
        if rendering.marked is not None:
            spans = self._use_marks(rendering, spans)
        ended = {turn.end for turn in turns if turn.ended}
        return self._encode_spans(rendering.text, [(start, end, end in ended) for start, end in spans], counts)

    def _choose(self, turns: Sequence[Turn], conversation: Conversation, counts: Counter[str]) -> list[Turn]:
        """Those that are trained."""
        wanted = [turn for turn in turns if turn.message not in conversation.untrained]
        counts["answers_untrained"] += len(turns) - len(wanted)
        if self._settings.last_turn_only or self._settings.samples == "turn":
            wanted = wanted[-1:]
        chosen = [turn for turn in wanted if turn.start is not None and turn.start < turn.end]
        counts["answers_left_out"] += len(wanted) - len(chosen)
        counts["answers_trained"] += len(chosen)
        counts["empty_thoughts"] += sum(turn.inserted for turn in chosen)
        return chosen

    def _use_marks(self, rendering: Rendering, spans: list[Span]) -> list[Span]:
        """The template's own marks, of the turns in ``spans``, unless they are wrong; then it is said, once."""
        marked = [(start, end) for start, end in rendering.marked or () if start < end]
        if rendering.places is None and not spans:
            self._warn("the chat template's own {% generation %} marks are used unchecked: it looks into texts")
            return marked
        problem = _problem_of_marks(marked, spans, rendering)
        if problem:
            self._warn(
                f"the chat template marks answers with {{% generation %}}, but {problem}; its marks are not used"
            )
            return spans
        return [span for span in marked if any(span[0] < end and start < span[1] for start, end in spans)]

    def _encode_spans(self, text: str, spans: Sequence[tuple[int, int, bool]], counts: Counter[str]) -> EncodedPrompt:
        """:param spans: trained characters, and whether the template ends the turn there."""
        encoded = self._tokenizer.encode(text)
        input_ids, most = encoded.input_ids, self._settings.max_length
        mask = bytearray(len(input_ids))
        for start, end, ended in spans:
            first, stop = encoded.tokens_between(start, end)
            mask[first:stop] = b"\x01" * (stop - first)
            if first < stop <= most:
                stops = input_ids[stop - 1] in self._stops if self._stops else ended
                counts["ends_trained" if stops else "ends_missing"] += 1
        counts["cut"] += len(input_ids) > most
        return EncodedPrompt(input_ids[:most], list(mask[:most]), {name: n for name, n in counts.items() if n})

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning("%s", message)


def _answers(conversation: Conversation) -> list[int]:
    return [
        index
        for index, message in enumerate(conversation.messages)
        if message.get("role") == "assistant" and index not in conversation.untrained
    ]


def _up_to(conversation: Conversation, index: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[: index + 1])


def _problem_of_marks(marked: Sequence[Span], spans: Sequence[Span], rendering: Rendering) -> str:
    """What is wrong with the template's marks, in words; "" if they are right."""
    for place in rendering.places or ():
        others = rendering.messages[place.text.message].get("role") != "assistant"
        if others and any(start < place.end and place.start < end for start, end in marked):
            return f"they also train what {rendering.messages[place.text.message].get('role')} wrote"
    for start, end in spans:
        own = [mark for mark in marked if mark[0] < end and start < mark[1]]
        if not own:
            return "they leave an answer out"
        if max(stop for _, stop in own) < end:
            return "they leave out what ends an answer"
        if min(begin for begin, _ in own) < start:
            return "they also train what stands before an answer"
    return ""


def _count_texts(rendering: Rendering, counts: Counter[str], *, names_tools: bool) -> None:
    """:raises DataError: a call is not rendered, so that the draft would learn to end the turn instead."""
    for text in rendering.lost:
        message = rendering.messages[text.message]
        if text.kind is Kind.CALL:
            key = next((key for key in CALL_KEYS if message.get(key)), CALL_KEYS[0])
            raise DataError(
                f"the chat template does not render {key} of this turn",
                where=f"messages[{text.message}]",
                hint="use a template that renders calls, or put the call into the content as the target writes it",
            )
        if text.kind is Kind.THOUGHT:
            counts["thoughts_lost"] += 1
        elif message.get("role") == "assistant":
            counts["answers_left_out"] += 1
        else:
            counts["texts_lost"] += 1
    for place in rendering.places or ():
        counts["thoughts_rendered"] += place.text.kind is Kind.THOUGHT
    counts["tool_calls"] += sum(
        len(calls) if isinstance(calls, list) else 1
        for message in rendering.messages
        for calls in [message.get("tool_calls") or message.get("function_call")]
        if calls
    )
    if rendering.tools:
        counts["tools_rendered" if names_tools else "tools_lost"] += 1
