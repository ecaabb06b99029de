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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.marking import Kind, Place
from specforge_core.prompts.masking.rendering import Rendering, TemplateRenderer
from specforge_core.prompts.masking.turn_ends import THINKING_TAG, TurnEnds, before_thinking, has_thinking

Span = tuple[int, int]

_EMPTY_BLOCK = re.compile(rf"\s*(?:{THINKING_TAG}\s*)*{THINKING_TAG}\s*", re.IGNORECASE)
_OPEN_TAG = re.compile(r"[<\[][^<>\[\]]*$")
_CLOSED = re.compile(r"/|end", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn of a rendering.

    :param message: which message it is.
    :param start: where its trained text begins; None where that cannot be told.
    :param body_end: where its own texts end; what ends the turn follows.
    :param ended: whether it ends with a token that ends turns.
    :param inserted: whether an empty thinking block was inserted before it.
    """

    message: int
    start: int | None
    body_end: int
    end: int
    ended: bool
    inserted: bool = False


class TurnLocator:
    """Finds the assistant turns of renderings by one template."""

    def __init__(self, renderer: TemplateRenderer, ends: TurnEnds):
        self._renderer = renderer
        self._ends = ends
        self._plain_prompts = frozenset(self._probe_prompts())

    @cached_property
    def _blocks(self) -> frozenset[str]:
        """The empty thinking block that the template inserts before a plain answer, if it does."""
        rendering = self._render_plain("user", "assistant")
        if rendering is None or not rendering.places:
            return frozenset()
        room = _room_of(rendering, 1)
        header = self._prompt_length(rendering, 1, room, least=0) or 0
        gap = rendering.text[room.start + header : room.gap_end]
        return frozenset({gap[: _block_length(gap)]} - {""})

    def _probe_prompts(self) -> Iterator[str]:
        """What follows a question in its prompt, in plain conversations: most rows have just that."""
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            rendering = self._render_plain(*roles)
            if rendering is None or not rendering.places:
                continue
            try:
                prompt, places = self._renderer.first_messages(rendering, len(roles), add_generation_prompt=True)
                yield prompt[_end_of(rendering.places[-1], places) :]
            except DataError:
                continue

    def _render_plain(self, *roles: str) -> Rendering | None:
        try:
            return self._renderer.render(Conversation([{"role": role, "content": f"plain {role}"} for role in roles]))
        except DataError:
            return None

    def locate(self, rendering: Rendering) -> list[Turn]:
        """The assistant turns of a rendering, in order."""
        if rendering.places is None:
            return self._locate_by_prefixes(rendering)
        turns: list[Turn] = []
        before = None
        for index, message in enumerate(rendering.messages):
            if message.get("role") != "assistant":
                continue
            before = self._locate_turn(rendering, index, before)
            turns.append(before)
        return turns

    def _locate_turn(self, rendering: Rendering, index: int, before: Turn | None) -> Turn:
        """:param before: the assistant turn before."""
        room = _room_of(rendering, index)
        prompt_length = self._prompt_length(rendering, index, room, least=before.body_end if before else 0)
        after = before.end if before else 0
        answered = index > 0 and rendering.messages[index - 1].get("role") == "assistant"
        between = rendering.text[after : room.gap_end] if room.own else ""
        if prompt_length is None and answered and room.start <= after <= room.gap_end and not between.strip():
            prompt_length = after - room.start  # it follows another answer without a header of its own
        if prompt_length is None:
            end = max(after, room.own[-1].end if room.own else room.start)
            return Turn(index, None, end, end, ended=False)
        start = room.start + prompt_length
        body_end = max(room.own[-1].end if room.own else start, start)
        inserted = 0
        if not room.own:
            inserted = self._inserted_length(rendering.text[start : room.end], exact=True)
            body_end += inserted
        elif room.own[0].text.kind is not Kind.THOUGHT:
            gap = rendering.text[start : room.gap_end]
            inserted = self._inserted_length(gap, exact=not room.own[0].text.indented)
        next_role = rendering.messages[index + 1].get("role") if index + 1 < len(rendering.messages) else None
        end, ended = self._ends.find(
            rendering.text[body_end : room.end],
            next_role=next_role,
            closing=lambda: self._closing(rendering, index),
        )
        return Turn(index, start + inserted, body_end, body_end + end, ended, inserted=bool(inserted))

    def _inserted_length(self, gap: str, *, exact: bool) -> int:
        """The length of the empty thinking block that ``gap`` begins with.

        :param exact: whether ``gap`` ends where the template's own text ends. Otherwise whitespace of the answer may
            follow, and a block that is known tells where it begins.
        """
        length = _block_length(gap) if gap else 0
        if length and not exact:
            length = max((len(block) for block in self._blocks if gap.startswith(block)), default=length)
        return length

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
                turns.append(Turn(index, None, 0, 0, ended=False))
                continue
            until = until[: _common_prefix_length(until, rendering.text)]
            inserted = self._inserted_length(until[len(prompt) :], exact=True)
            end, ended = self._ends.find_last(until[len(prompt) :])
            end += len(prompt)
            turns.append(Turn(index, len(prompt) + inserted, end, end, ended, inserted=bool(inserted)))
        return turns

    def _prompt_length(self, rendering: Rendering, index: int, room: _Room, *, least: int) -> int | None:
        """How much of what follows the last text before an answer its prompt would show.

        :param least: where the prompt's header may begin.
        """
        gap, anchor = rendering.text[room.start : room.gap_end], room.anchor
        previous = rendering.messages[index - 1] if index else {}
        plain = previous.get("role") == "user" and rendering.tools is None and not rendering.own_arguments
        if plain and gap in self._plain_prompts and not has_thinking(gap):  # texts often decide about thinking
            return len(gap)
        try:
            text, places = self._renderer.first_messages(rendering, index, add_generation_prompt=True)
            shown = text[_end_of(anchor, places) :]
        except DataError:
            return _prompt_within(gap, self._ends.header, first=not room.own, least=least - room.start)
        asks = previous.get("role") in ("user", "tool") or self._ends.is_asking(shown)
        if asks and rendering.text.startswith(shown, room.start):
            return len(shown)
        return _prompt_within(
            gap, self._generation_prompt(rendering, index, text), first=not room.own, least=least - room.start
        )

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


@dataclass(frozen=True, slots=True)
class _Room:
    """Where an answer may stand: between the texts of other messages.

    :param anchor: the last text before it, and ``start`` its end.
    :param own: the answer's own texts, up to the first text of another message among them.
    :param gap_end: where its own texts begin, or the room ends.
    """

    anchor: Place | None
    start: int
    own: Sequence[Place]
    gap_end: int
    end: int


def _room_of(rendering: Rendering, index: int) -> _Room:
    places = rendering.places or ()
    own: list[Place] = []
    for place in places:
        if place.text.message == index:
            own.append(place)
        elif own:
            break
    before = [p for p in places if p.text.message < index and (not own or p.end <= own[0].start)]
    if not own:  # texts of earlier messages may stand further on
        last = max((place.text.message for place in before), default=None)
        before = [place for place in before if place.text.message == last]
    anchor = max(before, key=lambda place: place.end, default=None)
    start = anchor.end if anchor else 0
    least = own[-1].end if own else start
    end = min((p.start for p in places if p.text.message != index and p.start >= least), default=len(rendering.text))
    return _Room(anchor, start, own, own[0].start if own else end, end)


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


def _prompt_within(gap: str, prompt: str, *, first: bool, least: int) -> int | None:
    """The end, in ``gap``, of the longest beginning of ``prompt`` that stands in it; None if that is no part of it.

    A past turn lacks what only a generation prompt opens (a thinking block), so a beginning is enough; it is no part
    of a tag.

    :param first: where it stands several times, the first counts (an empty answer may follow), else the last.
    """
    enough = before_thinking(prompt)
    best_length, best_end = 0, None
    for position in range(max(least, 0), len(gap)):
        length = _common_prefix_length(gap[position:], prompt)
        if 0 < length < len(prompt):
            length = len(_OPEN_TAG.sub("", prompt[:length]))
        if length and first and length >= len(enough):
            return position + length
        if length and length >= best_length:
            best_length, best_end = length, position + length
    return best_end if best_length and best_length >= len(enough) else None


def _block_length(gap: str) -> int:
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
