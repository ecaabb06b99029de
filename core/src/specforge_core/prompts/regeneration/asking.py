# SPDX-License-Identifier: Apache-2.0
"""A conversation so far to a request for its next answer, and what came to a turn of it.

Engines of this process are asked in tokens, rendered and encoded as prompts are; servers are asked in messages and
render with their own template. Whether the target thinks is said by the variable that its template has for that.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specforge_core.contracts import ChatTokenizer, DataError, GeneratedAnswer, GenerationRequest
from specforge_core.prompts.conversation import Conversation, Message
from specforge_core.prompts.masking.rendering import TemplateRenderer
from specforge_core.prompts.masking.template_source import TemplateSource
from specforge_core.prompts.regeneration.answer_text import split_calls, split_thought
from specforge_core.prompts.regeneration.dialogue import Dialogue, make_seed, thinks, turn_of

Thinking = Literal["template", "on", "off", "mixed"]

_SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "think", "reasoning")
"""What templates call the variable that says whether the target thinks: true or false."""
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"},)


@dataclass(frozen=True, slots=True)
class AskingRules:
    """What decides how a conversation is asked.

    :param arguments: variables of the template; a row's own win over them.
    :param date: what the template is told today is.
    :param in_tokens: whether requests are tokens; else they are messages.
    """

    seed: int = 0
    thinking: Thinking = "template"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None
    in_tokens: bool = True


def find_switch(tokenizer: ChatTokenizer, rules: AskingRules) -> str | None:
    """The template's variable that turns thinking on and off: one that changes what it renders. None: it has none."""
    names = TemplateSource(tokenizer.template).names
    for name in _SWITCHES:
        if name in names:
            with_it, without = (_try_switch(tokenizer, rules, {name: value}) for value in (True, False))
            if with_it != without:
                return name
    return None


def _try_switch(tokenizer: ChatTokenizer, rules: AskingRules, arguments: Mapping[str, Any]) -> str:
    given = {**rules.arguments, **arguments}
    return tokenizer.render(_PROBE, add_generation_prompt=True, arguments=given, date=rules.date).text


class Asker:
    """Makes requests and reads answers.

    :raises DataError: thinking is to be turned on or off, and the template has no variable for that.
    """

    def __init__(self, tokenizer: ChatTokenizer, rules: AskingRules) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._renderer = TemplateRenderer(tokenizer, arguments=rules.arguments, date=rules.date)
        self._switch = None if rules.thinking == "template" else find_switch(tokenizer, rules)
        if rules.thinking != "template" and self._switch is None:
            raise DataError(
                f"is {rules.thinking}, but the chat template has no variable that turns thinking on or off",
                where="regenerate.thinking",
                hint=f"leave it out; known are {', '.join(_SWITCHES)}, others can be set under data.template_arguments",
            )

    def arguments_of(self, prompt_id: str, conversation: Conversation) -> dict[str, Any]:
        """The template's variables: the run's, the row's, and whether the target thinks."""
        own = {**self._rules.arguments, **conversation.template_arguments}
        if self._switch is not None:
            mixed = self._rules.thinking == "mixed"
            own[self._switch] = thinks(self._rules.seed, prompt_id) if mixed else self._rules.thinking == "on"
        return own

    def ask(self, prompt_id: str, dialogue: Dialogue) -> GenerationRequest:
        """:raises DataError: the template refuses the conversation."""
        turn = len(dialogue.made)
        request = GenerationRequest(
            request_id=f"{prompt_id}:{turn}",
            messages=list(dialogue.messages),
            tools=dialogue.source.tools,
            arguments=self.arguments_of(prompt_id, dialogue.source),
            seed=make_seed(self._rules.seed, prompt_id, turn),
        )
        if not self._rules.in_tokens:
            return request
        return replace(request, input_ids=tuple(self._tokenizer.encode(self._render(request)).input_ids))

    def read(self, request: GenerationRequest, answer: GeneratedAnswer) -> tuple[GeneratedAnswer, Message]:
        """The answer, taken apart where the engine gave tokens alone, and as a turn."""
        said = answer.content or answer.thought or answer.tool_calls
        if answer.token_ids and not said and answer.finish_reason != "failed":
            answer = self._take_apart(request, answer, list(answer.token_ids))
        return answer, turn_of(answer.content, answer.thought, answer.tool_calls)

    def _take_apart(self, request: GenerationRequest, answer: GeneratedAnswer, token_ids: list[int]) -> GeneratedAnswer:
        while token_ids and token_ids[-1] in self._tokenizer.stop_token_ids:
            token_ids.pop()
        prompt = self._tokenizer.decode(request.input_ids[-_TAIL_TOKENS:])
        thought, content = split_thought(self._tokenizer.decode(token_ids), prompt=prompt)
        content, calls = split_calls(content) if request.tools else (content, [])
        ended = "calls" if calls and answer.finish_reason == "stop" else answer.finish_reason
        return replace(answer, content=content, thought=thought, tool_calls=calls, finish_reason=ended)

    def _render(self, request: GenerationRequest) -> str:
        """The prompt as text: in the form in which the template takes the conversation."""
        conversation = Conversation(request.messages, request.tools, template_arguments=request.arguments)
        rendering = self._renderer.render(conversation)
        return self._renderer.plain(rendering, len(rendering.messages), add_generation_prompt=True)


_TAIL_TOKENS = 64
"""Of the prompt's end, in which a thought may be opened."""
