# SPDX-License-Identifier: Apache-2.0
"""Answers of the target: what is asked of an engine or a server, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "calls", "failed"]
"""A stop token ended it; the token limit cut it; it ends in tool calls; nothing came, and ``error`` says why."""


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are sampled.

    :param temperature: 0 takes the likeliest token each time.
    :param top_k: 0 leaves it out.
    :param max_tokens: of one answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 1024


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One answer to be made.

    :param request_id: unlike any other's of the run, and the same each time.
    :param messages: what stands before the answer, as the chat template gets it.
    :param arguments: variables of the chat template.
    :param input_ids: the prompt in tokens, its generation prompt included, for engines that take tokens.
    :param seed: of this request, where answers are sampled.
    """

    request_id: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    input_ids: Sequence[int] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer, or why there is none.

    :param content: its text, without thought and calls where they come apart.
    :param prompt_ids: the prompt as the target saw it; None where the server does not say.
    :param token_ids: the answer as the target wrote it, what ended it included; None where the server does not say.
    :param usage: token counts by name.
    """

    request_id: str
    finish_reason: FinishReason
    content: str = ""
    thought: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] = ()
    prompt_ids: Sequence[int] | None = None
    token_ids: Sequence[int] | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    error: str = ""


class AnswerSource(Protocol):
    """An engine of this process, or servers, that answer."""

    @property
    def answers_together(self) -> bool:
        """Whether an answer's bits depend on what is answered at the same time, and on nothing else.

        Requests that were asked together are then asked together again after a kill, so that they are answered alike.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Who answers: ``model``, and versions. It goes into the manifest of what was made.

        :raises TargetError: nobody does.
        """
        ...

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        """An answer for each request, in the order in which they are done.

        An engine that gives ``token_ids`` may leave text, thought and calls to the caller.

        :param requests: taken one by one as there is room. None says that the next one depends on an answer that is
            in flight: ask again after one was given. A request that fails for good is an answer too.

        :raises TargetError: nobody answers any more.
        """
        ...

    def close(self) -> None:
        """Give back connections. Idempotent."""
        ...
