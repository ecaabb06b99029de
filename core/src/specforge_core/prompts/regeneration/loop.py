# SPDX-License-Identifier: Apache-2.0
"""Asks for answers, many at a time, and keeps each conversation as it is done.

Conversations come in batches that nobody else has (``claims``); what is in flight never waits for a batch to be
complete. Who answers, and how batches are shared, is given: an engine or servers, a desk or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specforge_core.contracts import (
    AnswerSource,
    DataError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    Progress,
    StopSignal,
)
from specforge_core.prompts.regeneration.dialogue import Dialogue
from specforge_core.prompts.regeneration.journal import Journal


class Claims(Protocol):
    """Batches of conversations, each in one process's hands."""

    def take(self, *, wait: bool) -> Sequence[tuple[int, Dialogue]] | None:
        """The next batch, with each conversation's place, without those that were made; None if there is none now.

        :param wait: whether others may still give one back, so that a moment is waited.
        """
        ...

    def finish(self, places: Sequence[int]) -> None:
        """Those of a batch are kept."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether no batch is left, in nobody's hands and in no other process's."""
        ...


@dataclass(slots=True)
class _Batch:
    places: Sequence[int]
    left: int


@dataclass(slots=True)
class RegenerationLoop:
    """One process's share of the work.

    :param ask: makes the request for a conversation's next answer.
    """

    source: AnswerSource
    settings: GenerationSettings
    claims: Claims
    journal: Journal
    ask: Callable[[Dialogue], GenerationRequest]
    progress: Progress
    stop: StopSignal
    answers: int = 0
    tokens: int = 0
    _ready: deque[tuple[int, Dialogue]] = field(default_factory=deque)
    _asked: dict[str, tuple[int, Dialogue]] = field(default_factory=dict)
    _batches: dict[int, _Batch] = field(default_factory=dict)

    def run(self) -> None:
        """Until no conversation is left.

        :raises TargetError: nobody answers any more. :raises RunStopped: the run was stopped.
        """
        for answer in self.source.answer(self._requests(), self.settings):
            self._take(answer)
            self.stop.raise_if_requested()

    def _requests(self) -> Iterator[GenerationRequest | None]:
        while True:
            self.stop.raise_if_requested()
            if not self._ready:
                self._claim()
            if self._ready:
                place, dialogue = self._ready.popleft()
                if dialogue.ending:  # nothing of it is to be made
                    self._keep(place, dialogue)
                    continue
                request = self._request(place, dialogue)
                if request is not None:
                    yield request
            elif self._asked:
                yield None
            elif self.claims.exhausted:
                return

    def _claim(self) -> None:
        batch = self.claims.take(wait=not self._asked)
        if not batch:
            return
        kept = _Batch([place for place, _ in batch], len(batch))
        self._batches |= {place: kept for place, _ in batch}
        self._ready.extend(batch)

    def _request(self, place: int, dialogue: Dialogue) -> GenerationRequest | None:
        """None where the chat template refuses what stands before the answer: that is how the conversation ends."""
        try:
            request = self.ask(dialogue)
        except DataError as error:
            dialogue.take(GeneratedAnswer(dialogue.prompt_id, "failed", error=str(error)))
            self._keep(place, dialogue)
            return None
        self._asked[request.request_id] = (place, dialogue)
        return request

    def _take(self, answer: GeneratedAnswer) -> None:
        place, dialogue = self._asked.pop(answer.request_id)
        dialogue.take(answer)
        self.answers += 1
        self.tokens += len(answer.token_ids or ()) or answer.usage.get("completion_tokens", 0)
        if dialogue.ending:
            self._keep(place, dialogue)
        else:
            self._ready.appendleft((place, dialogue))

    def _keep(self, place: int, dialogue: Dialogue) -> None:
        self.journal.append(place, dialogue.rows(), dialogue.ending)
        self.progress.advance(1, answers=self.answers, tokens=self.tokens)
        batch = self._batches.pop(place)
        batch.left -= 1
        if not batch.left:
            self.claims.finish(batch.places)
