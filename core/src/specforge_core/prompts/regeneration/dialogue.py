# SPDX-License-Identifier: Apache-2.0
"""A conversation whose answers are made anew, one after the other: a pure state machine that is told what came.

The turns of everybody else are kept. An answer of the source is replaced by the target's own, made upon the target's
own answers before it. Tool results are spliced in after the calls that the target makes, in their order, where it
calls the same functions; where it does not, the recorded results answer nothing it asked, and the conversation ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from specforge_core.contracts import GeneratedAnswer
from specforge_core.prompts.conversation import Conversation, Message

Turns = Literal["all", "last"]

ENDINGS: Mapping[str, str] = {
    "done": "every answer that was wanted was made",
    "cut": "an answer reached regenerate.max_tokens: nothing is built upon it",
    "failed": "an answer could not be made",
    "other_calls": "the target calls other tools than those whose results the source has",
    "no_calls": "the source goes on with tool results, and the target calls no tool",
    "nothing_asked": "there is nothing to answer: no turn of a user",
}
"""How regenerating a conversation may end."""


@dataclass(frozen=True, slots=True)
class MadeAnswer:
    """An answer that was made, and where it stands.

    :param position: its place among the messages of the regenerated conversation.
    """

    position: int
    answer: GeneratedAnswer


@dataclass(slots=True)
class Dialogue:
    """One conversation on its way.

    :ivar messages: what stands so far: kept turns and made answers.
    :ivar ending: one of ``ENDINGS``, or "" while an answer is wanted.
    """

    source: Conversation
    turns: Turns
    messages: list[Message] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    made: list[MadeAnswer] = field(default_factory=list)
    ending: str = ""
    _next: int = 0

    def __post_init__(self) -> None:
        self._advance()

    @property
    def wants_answer(self) -> bool:
        """Whether what stands so far is to be answered."""
        return not self.ending

    def take(self, answer: GeneratedAnswer, message: Message) -> None:
        """What came.

        :param message: the answer as a turn; of a failed one nothing is used.
        """
        self.made.append(MadeAnswer(len(self.messages), answer))
        if answer.finish_reason == "failed":
            self.ending = "failed"
            return
        self.messages.append(message)
        if answer.finish_reason == "length":
            self.ending = "cut"
            return
        self._skip_answer()
        self._splice_results(message)
        if not self.ending:
            self._advance()

    def _advance(self) -> None:
        """Keep turns up to the next answer that is wanted, or to the end."""
        source = self.source.messages
        while self._next < len(source):
            message = source[self._next]
            if message["role"] == "assistant" and self._is_wanted(self._next):
                return
            if message["role"] == "assistant":
                self.kept.add(len(self.messages))
            self.messages.append(message)
            self._next += 1
        if not self.messages or self.messages[-1]["role"] not in ("user", "tool"):
            self.ending = "done" if self.made else "nothing_asked"

    def _is_wanted(self, index: int) -> bool:
        """Whether the source's answer there is made anew: one that answers somebody, and that may be trained."""
        asked = any(message["role"] in ("user", "tool") for message in self.messages)
        if not asked or index in self.source.untrained:
            return False
        return self.turns == "all" or index == self._last_wanted()

    def _last_wanted(self) -> int:
        """The first message of the last answer, if nobody is left to answer after it."""
        source = self.source.messages
        last = len(source) - 1
        if source[last]["role"] != "assistant":
            return -1
        while last and source[last - 1]["role"] == "assistant" and last - 1 not in self.source.untrained:
            last -= 1
        return last

    def _skip_answer(self) -> None:
        """Leave the source's own answer out: all its messages, where it has several in a row."""
        source = self.source.messages
        while self._next < len(source) and source[self._next]["role"] == "assistant":
            self._next += 1

    def _splice_results(self, message: Message) -> None:
        source, calls = self.source.messages, list(message.get("tool_calls") or ())
        first = self._next
        while self._next < len(source) and source[self._next]["role"] == "tool":
            self._next += 1
        results = source[first : self._next]
        if not results:
            self.ending = "other_calls" if calls and self._next < len(source) else ""
            return
        if not calls:
            self.ending = "no_calls"
            return
        names = _called(source[first - 1])
        if len(calls) != len(results) or (names and names != _called(message)):
            self.ending = "other_calls"
            return
        for call, result in zip(calls, _in_order(results, source[first - 1]), strict=True):
            given = {"tool_call_id": call["id"]} if "tool_call_id" in result and "id" in call else {}
            self.messages.append({**result, **given})


def _called(message: Message) -> list[str]:
    """The functions that a turn calls, in order."""
    calls = list(message.get("tool_calls") or ())
    if not calls and isinstance(message.get("function_call"), Mapping):
        calls = [message["function_call"]]
    return [str(call.get("function", call).get("name", "")) for call in calls]


def _in_order(results: Sequence[Message], calls: Message) -> list[Message]:
    """The results in the order of the source's calls, where their ids tell."""
    ids = [call.get("id") for call in calls.get("tool_calls") or ()]
    by_id = {result.get("tool_call_id"): result for result in results}
    if len(by_id) == len(results) == len(ids) and None not in by_id and set(ids) == set(by_id):
        return [by_id[call_id] for call_id in ids]
    return list(results)


def make_seed(seed: int, prompt_id: str, turn: int) -> int:
    """The seed of one answer, the same each time and unlike others'."""
    return int.from_bytes(hashlib.blake2b(json.dumps([seed, prompt_id, turn]).encode(), digest_size=4).digest()) >> 1


def thinks(seed: int, prompt_id: str) -> bool:
    """Whether this conversation is one of the half that thinks (``regenerate.thinking: mixed``)."""
    return bool(hashlib.blake2b(json.dumps([seed, "thinks", prompt_id]).encode(), digest_size=1).digest()[0] & 1)


def turn_of(content: str, thought: str | None, tool_calls: Sequence[Mapping[str, Any]]) -> Message:
    """An answer as a turn of a conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought is not None:
        message["reasoning_content"] = thought
    if tool_calls:
        message["tool_calls"] = [dict(call) for call in tool_calls]
    return message
