# SPDX-License-Identifier: Apache-2.0
"""One conversation whose answers are made anew: what is asked next, and what became of it. Pure.

Turns that are not the assistant's stay as they are. Recorded tool results follow the target's own calls; where call
and result do not meet, the conversation ends there and says so. ``loop`` drives many of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specforge_core.contracts import GeneratedAnswer
from specforge_core.prompts.conversation import Conversation, Message

ENDINGS: Mapping[str, str] = {
    "answered": "conversations whose answers were all made",
    "cut": "conversations that end with an answer cut at regenerate.max_tokens; it is marked",
    "failed": "conversations that end with an answer that could not be made; the error is in the row",
    "calls_missing": "conversations that end where the source has tool results and the target called nothing",
    "results_missing": "conversations that end where the target calls and the source has no results",
}
"""How a conversation ends, and what that means."""


class Dialogue:
    """A conversation on its way.

    :param last_only: the last answer alone is made; those before it stay, and are not trained.
    """

    def __init__(self, prompt_id: str, conversation: Conversation, *, last_only: bool):
        self.prompt_id = prompt_id
        self.conversation = conversation
        answers = [n for n, message in enumerate(conversation.messages) if message.get("role") == "assistant"]
        self._wanted = frozenset(answers[-1:] if last_only else answers)
        self._next = 0
        self.messages: list[Message] = []
        self.answers: list[GeneratedAnswer] = []
        self.ending = ""
        self._chains: list[tuple[list[int], list[int], int]] = []
        """Token ids and mask of answers that follow each other, and how many messages they cover."""
        self._go_on()

    @property
    def turn(self) -> int:
        """How many answers were made."""
        return len(self.answers)

    def take(self, answer: GeneratedAnswer) -> None:
        """The answer to ``messages``."""
        self.answers.append(answer)
        if answer.finish_reason == "failed":
            self.ending = "failed"
            return
        self.messages.append(_as_message(answer))
        self._add_ids(answer)
        self._next += 1
        if answer.finish_reason == "length":
            self.ending = "cut"
            return
        self._splice_results(answer)
        if not self.ending:
            self._go_on()

    def rows(self) -> list[dict[str, Any]]:
        """What is kept of it: one row, or one for each run of token ids that continue each other."""
        made = {
            "ending": self.ending,
            "finish_reasons": [answer.finish_reason for answer in self.answers],
            "usage": [dict(answer.usage) for answer in self.answers],
        }
        if self.ending == "failed":
            made["error"] = self.answers[-1].error
        common: dict[str, Any] = {}
        if self.conversation.tools is not None:
            common["tools"] = list(self.conversation.tools)
        if self.conversation.template_arguments:
            common["chat_template_kwargs"] = dict(self.conversation.template_arguments)
        if not self._chains:
            return [{"id": self.prompt_id, "messages": self.messages, **common, "made": made}]
        return [
            {
                "id": self.prompt_id if place == 1 else f"{self.prompt_id}.{place}",
                "messages": self.messages[:covered],
                **common,
                "input_ids": ids,
                "loss_mask": mask,
                "made": made,
            }
            for place, (ids, mask, covered) in enumerate(self._chains, start=1)
        ]

    def _go_on(self) -> None:
        """To the next answer that is to be made."""
        source = self.conversation.messages
        while self._next < len(source) and self._next not in self._wanted:
            message = source[self._next]
            kept = {**message, "train": False} if message.get("role") == "assistant" else message
            self.messages.append(kept)
            self._next += 1
        if self._next == len(source):
            while self.messages and self.messages[-1].get("role") != "assistant":
                self.messages.pop()  # nobody answers them
            self.ending = "answered"

    def _splice_results(self, answer: GeneratedAnswer) -> None:
        results: list[Message] = []
        source = self.conversation.messages
        while self._next < len(source) and source[self._next].get("role") == "tool":
            results.append(source[self._next])
            self._next += 1
        if results and not answer.tool_calls:
            self.ending = "calls_missing"
        elif answer.tool_calls and len(results) < len(answer.tool_calls):
            self.ending = "results_missing"
        for result, call in zip(results, answer.tool_calls, strict=False):
            known = {"tool_call_id": call["id"]} if "tool_call_id" in result and "id" in call else {}
            self.messages.append({**result, **known})

    def _add_ids(self, answer: GeneratedAnswer) -> None:
        if answer.prompt_ids is None or answer.token_ids is None:
            return
        prompt, made = list(answer.prompt_ids), list(answer.token_ids)
        covered = len(self.messages)
        last = self._chains[-1] if self._chains else None
        if last is not None and prompt[: len(last[0])] == last[0]:
            mask = last[1] + [0] * (len(prompt) - len(last[0])) + [1] * len(made)
            self._chains[-1] = (prompt + made, mask, covered)
        else:
            self._chains.append((prompt + made, [0] * len(prompt) + [1] * len(made), covered))


def _as_message(answer: GeneratedAnswer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.thought is not None:
        message["reasoning_content"] = answer.thought
    if answer.tool_calls:
        message["tool_calls"] = [dict(call) for call in answer.tool_calls]
    if answer.finish_reason == "length":
        message["train"] = False  # encoded again, it would end as if it were complete; its token ids do not
    return message


def count_endings(endings: Sequence[str]) -> dict[str, int]:
    """How many conversations ended in each way."""
    return {name: endings.count(name) for name in ENDINGS if name in endings}
