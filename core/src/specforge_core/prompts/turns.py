# SPDX-License-Identifier: Apache-2.0
"""Where each answer stands in a rendered conversation: from where its prompt ends to what ends its turn.

An answer begins where the prompt that a server would show at that point ends: the turns before it, rendered with the
generation prompt. Its prompt and the whole text are compared from the last text that both have, so that a template may
rewrite what came before. Between the prompt and the answer's own text stands what the model writes (a channel, a tag
of a call), or what the template inserts (an empty thinking block), which is not trained. A turn ends with the token
that ends turns in this template (``turn_ends``), or, where it has none, with the token that opens the next.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from specforge_core.contracts import DataError
from specforge_core.prompts.marking import Kind, Place
from specforge_core.prompts.rendering import Rendering, TemplateRenderer
from specforge_core.prompts.turn_ends import THINKING_TAG, TurnEnds, before_thinking

Span = tuple[int, int]

_EMPTY_BLOCK = re.compile(rf"\s*(?:{THINKING_TAG}\s*)*{THINKING_TAG}\s*", re.IGNORECASE)
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]]*$")
_CLOSED = re.compile(r"/|end", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn of a rendering.

    :param message: which message it is.
    :param start: where its trained text begins; None where that cannot be told.
    :param ended: whether it ends with a token that ends turns.
    :param inserted: whether an empty thinking block was inserted before it.
    """

    message: int
    start: int | None
    end: int
    ended: bool
    inserted: bool = False


class TurnLocator:
    """Finds the assistant turns of renderings by one template."""

    def __init__(self, renderer: TemplateRenderer, ends: TurnEnds):
        self._renderer = renderer
        self._ends = ends
        self._prompts: dict[tuple[object, ...], str] = {}
        """What follows the last text of the prompt of an answer, by what stands before it."""

    def locate(self, rendering: Rendering) -> list[Turn]:
        """The assistant turns of a rendering, in order."""
        if rendering.places is None:
            return self._locate_by_prefixes(rendering)
        turns: list[Turn] = []
        after = 0
        for index, message in enumerate(rendering.messages):
            if message.get("role") != "assistant":
                continue
            turn = self._locate_turn(rendering, index, after)
            turns.append(turn)
            after = turn.end
        return turns

    def _locate_turn(self, rendering: Rendering, index: int, after: int) -> Turn:
        places = rendering.places or ()
        before = [place for place in places if place.text.message < index]
        own = _own_run(places, index)
        anchor = _last_before(before, own[0].start if own else None)
        gap_start = max(anchor.end if anchor else 0, 0)
        others = [place.start for place in places if place.text.message != index and place.start >= gap_start]
        if own:
            gap_end = own[0].start
            body_end = own[-1].end
            others = [start for start in others if start >= body_end]
        else:
            gap_end = body_end = min(others, default=len(rendering.text))
        following = min(others, default=len(rendering.text))
        gap = rendering.text[gap_start:gap_end]
        prompt_length = self._prompt_length(rendering, index, anchor, gap)
        if prompt_length is None:
            return Turn(index, None, max(after, body_end if own else gap_start), ended=False)
        start = gap_start + prompt_length
        answers = own and own[0].text.kind is not Kind.THOUGHT
        inserted = _inserted(rendering.text[start:gap_end]) if answers else 0
        body_end = body_end if own else start
        end, ended = self._ends.find(
            rendering.text[body_end:following],
            is_last=index == len(rendering.messages) - 1,
            closing=lambda: self._closing(rendering, index),
        )
        return Turn(index, start + inserted, body_end + end, ended, inserted=bool(inserted))

    def _locate_by_prefixes(self, rendering: Rendering) -> list[Turn]:
        """Without places: an answer is what its prompt and the text that ends with it differ by, if the whole begins
        with both."""
        turns = []
        for index, message in enumerate(rendering.messages):
            if message.get("role") != "assistant":
                continue
            try:
                prompt = self._renderer.plain(rendering, index, add_generation_prompt=True)
                until = self._renderer.plain(rendering, index + 1, add_generation_prompt=False)
            except DataError:
                prompt = until = "\0"
            if not rendering.text.startswith(prompt) or not until.startswith(prompt):
                turns.append(Turn(index, None, 0, ended=False))
                continue
            until = until[: _common_prefix_length(until, rendering.text)]
            inserted = _inserted(until[len(prompt) :])
            end, ended = self._ends.find_last(until[len(prompt) :])
            turns.append(Turn(index, len(prompt) + inserted, len(prompt) + end, ended, inserted=bool(inserted)))
        return turns

    def _prompt_length(self, rendering: Rendering, index: int, anchor: Place | None, gap: str) -> int | None:
        """How much of ``gap``, what follows the last text before an answer, its prompt would show."""
        previous = rendering.messages[index - 1] if index else {}
        key = (
            *(previous.get("role"), bool(previous.get("tool_calls")), index == 0, anchor is None),
            *(rendering.tools is None, index > 1 and rendering.messages[index - 2].get("role")),
        )
        known = self._prompts.get(key)
        if known is not None and known == gap:
            return len(gap)
        try:
            text, places = self._renderer.first_messages(rendering, index, add_generation_prompt=True)
            shown = text[_end_of(anchor, places) :]
        except DataError:
            return _prompt_within(gap, self._ends.header)
        if self._ends.is_asking(shown):
            self._prompts[key] = shown
            if gap.startswith(shown):
                return len(shown)
        return _prompt_within(gap, self._generation_prompt(rendering, index, text))

    def _generation_prompt(self, rendering: Rendering, index: int, prompted: str) -> str:
        """What asking for an answer adds to the messages before it; that of a plain conversation if they refuse."""
        try:
            plain, _ = self._renderer.first_messages(rendering, index, add_generation_prompt=False)
        except DataError:
            plain = prompted
        return self._ends.without_end(prompted[_common_prefix_length(plain, prompted) :]) or self._ends.header

    def _closing(self, rendering: Rendering, index: int) -> str:
        """What follows the answer where it is the last message."""
        try:
            text, places = self._renderer.first_messages(rendering, index + 1, add_generation_prompt=False)
        except DataError:
            return ""
        own = [place.end for place in places if place.text.message == index]
        return text[max(own) :] if own else ""


def _own_run(places: Sequence[Place], index: int) -> list[Place]:
    """The places of a message's texts, up to the first text of another message among them."""
    run: list[Place] = []
    for place in places:
        if place.text.message == index:
            run.append(place)
        elif run:
            break
    return run


def _last_before(places: Sequence[Place], start: int | None) -> Place | None:
    ended = [place for place in places if start is None or place.end <= start]
    return max(ended, key=lambda place: place.end, default=None)


def _end_of(anchor: Place | None, places: Sequence[Place]) -> int:
    """Where the same text ends in another rendering.

    :raises DataError: it is not there.
    """
    if anchor is None:
        return 0
    for place in places:
        if place.text is anchor.text:
            return place.end
    raise DataError("the chat template leaves the text before the answer out of its prompt")


def _prompt_within(gap: str, prompt: str) -> int | None:
    """The end, in ``gap``, of the longest beginning of ``prompt`` that stands in it; None if that is no part of it.

    A past turn lacks what only a generation prompt opens (a thinking block), so a beginning is enough; it is no part
    of a tag.
    """
    best_length, best_end = 0, None
    for position in range(len(gap)):
        length = _common_prefix_length(gap[position:], prompt)
        if 0 < length < len(prompt):
            length = len(_OPEN_TAG.sub("", prompt[:length]))
        if length and length >= best_length:
            best_length, best_end = length, position + length
    enough = before_thinking(prompt)
    return best_end if best_length and best_length >= len(enough) else None


def _inserted(gap: str) -> int:
    """The length of the empty thinking block that ``gap`` begins with: tags about thinking, the last one closing."""
    found = _EMPTY_BLOCK.match(gap)
    if not found:
        return 0
    last = re.findall(THINKING_TAG, found.group(), re.IGNORECASE)[-1]
    return found.end() if _CLOSED.search(last) else 0


def _common_prefix_length(first: str, second: str) -> int:
    length, most = 0, min(len(first), len(second))
    while length < most and first[length] == second[length]:
        length += 1
    return length
