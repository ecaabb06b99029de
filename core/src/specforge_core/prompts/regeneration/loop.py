# SPDX-License-Identifier: Apache-2.0
"""The loop that has answers made: lease, ask, take, record, finish.

Any number of processes share the work by leases. A conversation is recorded once all its answers are there, durably,
before its lease is finished; whoever gets a lease looks first which of its conversations are recorded. Where answers
depend on what is answered at the same time, the conversations of a lease are asked together, apart from others, and
recorded together: a kill then repeats them as they were.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from specforge_core.contracts import (
    AnswerSource,
    DataError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    Lease,
    LeaseDesk,
    Progress,
    StopSignal,
)
from specforge_core.prompts.regeneration.answer_rows import make_rows
from specforge_core.prompts.regeneration.asked_prompts import AskedPrompts
from specforge_core.prompts.regeneration.asking import Asker
from specforge_core.prompts.regeneration.dialogue import Dialogue, Turns, turn_of

_WAIT_SECONDS = 0.5
"""For a lease, where other processes hold all that are left."""


class AnswerLog(Protocol):
    """Where finished conversations are recorded: this process's file, and those of the others to look into."""

    def recorded(self, first: int, count: int) -> set[int]:
        """Which of these conversations are recorded, by whomever."""
        ...

    def append(self, rows: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Record the rows of conversations, all or none, durably."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RegenerationParts:
    """What the loop drives.

    :param holder: this process's name at the desk.
    """

    source: AnswerSource
    asker: Asker
    asked: AskedPrompts
    desk: LeaseDesk
    holder: str
    log: AnswerLog
    settings: GenerationSettings
    turns: Turns


@dataclass(slots=True)
class _Held:
    """A lease and what of it is done."""

    lease: Lease
    open: set[int] = field(default_factory=set)
    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Open:
    """A conversation on its way."""

    index: int
    prompt_id: str
    dialogue: Dialogue
    held: _Held
    request: GenerationRequest | None = None


class Regeneration:
    """Works until every conversation is recorded, by this process or by others."""

    def __init__(self, parts: RegenerationParts, *, progress: Progress, stop: StopSignal) -> None:
        self._parts = parts
        self._progress = progress
        self._stop = stop
        self._ready: deque[_Open] = deque()
        self._asked: dict[str, _Open] = {}
        self._held: dict[str, _Held] = {}
        self._tokens = 0
        self._answers = 0
        self._began = self._looked = time.monotonic()
        self._looked -= _WAIT_SECONDS

    def run(self) -> None:
        """
        :raises RunStopped: a stop was requested; what is recorded stays, leases go back.
        :raises TargetError: nobody answers any more.
        """
        try:
            for answer in self._parts.source.answer(self._requests(), self._parts.settings):
                self._stop.raise_if_requested()
                self._take(answer)
        finally:
            for held in self._held.values():
                self._parts.desk.give_back(held.lease)

    def _requests(self) -> Iterator[GenerationRequest | None]:
        """What is wanted, one after the other; None while that depends on what is in flight."""
        while (request := self._next_request()) is not None or self._asked:
            yield request

    def _next_request(self) -> GenerationRequest | None:
        """The next answer that is wanted now. Waits for a lease only where nothing is in flight."""
        while True:
            self._stop.raise_if_requested()
            while self._ready:
                opened = self._ready.popleft()
                if self._ask(opened):
                    return opened.request
            if self._held and self._parts.source.answers_together:
                return None
            if not self._lease():
                return None

    def _ask(self, opened: _Open) -> bool:
        """Make the request. A conversation that the template refuses has failed, and is recorded as that."""
        try:
            request = self._parts.asker.ask(opened.prompt_id, opened.dialogue)
        except DataError as error:
            failed = GeneratedAnswer(f"{opened.prompt_id}:", "failed", error=error.message)
            opened.dialogue.take(failed, turn_of("", None, ()))
            self._end(opened)
            return False
        opened.request = request
        self._asked[request.request_id] = opened
        return True

    def _lease(self) -> bool:
        """Take a lease and open its conversations; False: there is none, now or any more."""
        desk, now = self._parts.desk, time.monotonic()
        if self._asked and now - self._looked < _WAIT_SECONDS:
            return False
        while (lease := desk.take(self._parts.holder, 0.0 if self._asked else _WAIT_SECONDS)) is None:
            self._looked = time.monotonic()
            if self._asked or not desk.outstanding():
                return False
            self._stop.raise_if_requested()
            self._progress.waiting("other processes, which have all that is left")
        self._progress.waiting(None)
        self._open(lease)
        return True

    def _open(self, lease: Lease) -> None:
        first, count = lease.batch.first, lease.batch.count
        done = self._parts.log.recorded(first, count)
        held = _Held(lease, open={*range(first, first + count)} - done)
        self._held[lease.batch.key] = held
        self._advance(len(done))
        for index in sorted(held.open):
            prompt_id, conversation = self._parts.asked[index]
            opened = _Open(index, prompt_id, Dialogue(conversation, self._parts.turns), held)
            if opened.dialogue.wants_answer:
                self._ready.append(opened)
            else:
                self._end(opened)
        if not held.open:
            self._finish(held)

    def _take(self, answer: GeneratedAnswer) -> None:
        opened = self._asked.pop(answer.request_id)
        assert opened.request is not None
        answer, message = self._parts.asker.read(opened.request, answer)
        self._answers += 1
        self._tokens += answer.usage.get("completion_tokens", 0)
        opened.dialogue.take(answer, message)
        if opened.dialogue.wants_answer:
            self._ready.append(opened)
        else:
            self._end(opened)

    def _end(self, opened: _Open) -> None:
        """Record a conversation that has ended: at once, or with all of its lease."""
        held, dialogue = opened.held, opened.dialogue
        arguments = self._parts.asker.arguments_of(opened.prompt_id, dialogue.source)
        held.rows[opened.index] = make_rows(opened.prompt_id, dialogue, arguments)
        held.open.discard(opened.index)
        if not self._parts.source.answers_together or not held.open:
            self._parts.log.append(dict(sorted(held.rows.items())))
            self._advance(len(held.rows))
            held.rows.clear()
        if not held.open:
            self._finish(held)

    def _finish(self, held: _Held) -> None:
        if self._held.pop(held.lease.batch.key, None) is not None:
            self._parts.desk.finish(held.lease)

    def _advance(self, conversations: int) -> None:
        seconds = max(time.monotonic() - self._began, 1e-3)
        rates = {"answers_per_second": self._answers / seconds, "tokens_per_second": self._tokens / seconds}
        self._progress.advance(conversations, **(rates if self._answers else {}))
