# SPDX-License-Identifier: Apache-2.0
"""What ends an assistant turn in a chat template, found out by rendering a plain conversation of four messages.

What follows the first answer is its end and the next question's header. Two other renderings tell them apart: the
header also stands before the first question, and the end also stands at the end of the conversation. Either may say
less than it should (a template may begin with a system text of its own, or leave an end out), so the longer end counts;
stop tokens of the target decide where they are known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from specforge_core.contracts import ChatTokenizer, DataError
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.rendering import Rendering, TemplateRenderer

THINKING_TAG = r"[<\[(|\u25c1]+\W*(?:\w+[:_-])*(?:think|thought|reason)\w*\W*?[>\])|\u25b7]+"
"""An opening or closing tag around thoughts, in any of the styles that models use."""

_LAST_BLOCK = re.compile(rf"(?:\s*{THINKING_TAG})*\s*$", re.IGNORECASE)

_QUESTIONS = ("first probing question", "second probing question")
_ANSWERS = ("first probing answer", "second probing answer")


@dataclass(frozen=True, slots=True)
class _Probe:
    """Texts of a plain conversation's rendering: before the first question, between it and its answer, after the first
    answer up to the next question, and after the last answer."""

    opening: str
    asked: str
    between: str
    closing: str


class TurnEnds:
    """The tokens that end turns, and how an answer's header reads."""

    def __init__(self, tokenizer: ChatTokenizer, renderer: TemplateRenderer):
        stops = _texts_of(tokenizer, tokenizer.stop_token_ids)
        self._specials = _pattern([*stops, *_texts_of(tokenizer, tokenizer.special_token_ids)])
        self.header = ""
        self._asks = ""
        self._ending: set[str] = set()
        self._ends_past_turns = False
        probe = _probe(renderer)
        if probe is not None:
            added = _added_header(renderer)
            self._learn(probe, frozenset(stops), added)
            added = self.without_end(added)
            self._asks = before_thinking(added)
            self.header = added or self.without_end(probe.asked)
        self._ending |= set(stops)

    def is_asking(self, prompt: str) -> bool:
        """Whether it ends with an answer's header, where this template asks for answers by one."""
        return _LAST_BLOCK.sub("", prompt).endswith(self._asks)

    def without_end(self, text: str) -> str:
        """Without the whitespace and the ends of turns that it begins with."""
        position = 0
        for start, end in self._find_specials(text):
            if text[position:start].strip() or text[start:end] not in self._ending:
                break
            position = end
        return text[position:].lstrip()

    def find(self, gap: str, *, next_role: str | None, closing: Callable[[], str]) -> tuple[int, bool]:
        """How much of ``gap``, what follows an answer's own text, belongs to its turn, and whether a token ends it.

        :param next_role: of the message that follows; None if none does.
        :param closing: what follows the answer where it is the last message.
        """
        found = self._find_specials(gap)
        most = gap.find(self.header) if next_role == "assistant" and self.header in gap else len(gap)
        ends = [end for start, end in found if gap[start:end] in self._ending and end <= most]
        for end in ends:
            goes_on = self.header and next_role != "assistant" and gap.startswith(self.header, end)
            if not goes_on or end == ends[-1]:  # otherwise the same answer goes on, in another channel say
                return end, True
        if found and next_role is None:
            return _end_of_run(found, gap), True
        body = gap if next_role is None else _common_prefix(gap, closing())
        closed = [end for _, end in found if end <= len(body)]
        if closed:
            return closed[-1], True
        if found and not self._ends_past_turns and found[0][0] <= most:
            return found[0][1], True
        if not self._ending and not body.strip():  # the template ends turns with whitespace
            body = gap[: len(gap) - len(gap.lstrip())]
            return len(body), False
        return len(body.rstrip()), False

    def find_last(self, turn: str) -> tuple[int, bool]:
        """As :meth:`find`, of a turn that is known to hold no other: its last ending token counts."""
        ends = [end for start, end in self._find_specials(turn) if turn[start:end] in self._ending]
        return (ends[-1], True) if ends else (len(turn.rstrip()), False)

    def _find_specials(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in self._specials.finditer(text)] if self._specials else []

    def _learn(self, probe: _Probe, stops: frozenset[str], header_of_answers: str) -> None:
        between = self._find_specials(probe.between)
        shared = _common_prefix(probe.between, probe.closing)
        header = _common_suffix(probe.between, probe.opening)
        by_closing = sum(end <= len(shared) for _, end in between)
        by_header = sum(end <= len(probe.between) - len(header) for _, end in between)
        openers = (header_of_answers[start:end] for start, end in self._find_specials(header_of_answers))
        opener = next((text for text in openers if text in probe.opening), None)  # it opens every message
        tokens = [probe.between[start:end] for start, end in between]
        count = tokens.index(opener) if opener in tokens else max(by_closing, by_header)
        stopping = [n for n, (start, end) in enumerate(between[:count], 1) if probe.between[start:end] in stops]
        count = stopping[-1] if stopping else count
        if count:
            self._ending.add(probe.between[slice(*between[count - 1])])
            self._ends_past_turns = True
        closing = self._find_specials(probe.closing)
        if closing and not any(probe.closing[start:end] in self._ending | stops for start, end in closing):
            end = _end_of_run(closing, probe.closing)
            self._ending |= {probe.closing[start:stop] for start, stop in closing if stop == end}


def has_thinking(prompt: str) -> bool:
    """Whether a tag around thoughts stands in it."""
    return re.search(THINKING_TAG, prompt, flags=re.IGNORECASE) is not None


def before_thinking(prompt: str) -> str:
    """What stands before the thinking that a generation prompt may open or close."""
    return re.split(THINKING_TAG, prompt, maxsplit=1, flags=re.IGNORECASE)[0].rstrip()


def _end_of_run(found: Sequence[tuple[int, int]], text: str) -> int:
    """Where the first run of special tokens, one right after the other, ends."""
    end = found[0][1]
    for start, stop in found[1:]:
        if start != end:
            break
        end = stop
    return end


def _probe(renderer: TemplateRenderer) -> _Probe | None:
    turns = [
        {"role": role, "content": text}
        for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True)
        for role, text in (("user", question), ("assistant", answer))
    ]
    try:
        rendering = renderer.render(Conversation(turns))
    except DataError:
        return None
    spans = _spans(rendering)
    if spans is None:
        return None
    text = rendering.text
    return _Probe(
        opening=text[: spans[0][0]],
        asked=text[spans[0][1] : spans[1][0]],
        between=text[spans[1][1] : spans[2][0]],
        closing=text[spans[3][1] :],
    )


def _spans(rendering: Rendering) -> list[tuple[int, int]] | None:
    """Where the four messages stand, one after the other."""
    places = rendering.places or ()
    spans = [(place.start, place.end) for place in places]
    return spans if [place.text.message for place in places] == [0, 1, 2, 3] else None


def _added_header(renderer: TemplateRenderer) -> str:
    """What asking for an answer adds to a question."""
    asked = Conversation([{"role": "user", "content": _QUESTIONS[0]}])
    try:
        rendering = renderer.render(asked)
        if rendering.marks is None:
            return ""
        prompted, _ = renderer.first_messages(rendering, 1, add_generation_prompt=True)
    except DataError:
        return ""
    return prompted[len(_common_prefix(rendering.text, prompted)) :]


def _texts_of(tokenizer: ChatTokenizer, token_ids: Collection[int]) -> list[str]:
    texts = (tokenizer.decode([token_id]) for token_id in sorted(token_ids))
    return [text for text in texts if text.strip()]


def _pattern(texts: Collection[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True)))) if texts else None


def _common_prefix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]
