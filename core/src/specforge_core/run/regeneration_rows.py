# SPDX-License-Identifier: Apache-2.0
"""The conversations that are answered anew: read in order, by place, and what is asked of the target next in each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from specforge_core.config.run_config import RunConfig
from specforge_core.contracts import ChatTokenizer, ConfigError, DataError, GenerationRequest
from specforge_core.prompts.conversation import SourceRow
from specforge_core.prompts.masking.template_source import TemplateSource
from specforge_core.prompts.reading.rows import BadRow, read_rows
from specforge_core.prompts.reading.sources import SourceFile
from specforge_core.prompts.regeneration.dialogue import Dialogue

_SWITCHES = ("enable_thinking", "thinking")


class RegenerationRows:
    """Rows of a split as dialogues.

    :param tokenizer: makes the target's; called when it is needed.
    :param limit: only the first so many rows.
    """

    def __init__(
        self,
        config: RunConfig,
        files: Sequence[SourceFile],
        *,
        tokenizer: Callable[[], ChatTokenizer],
        limit: int | None,
    ):
        self._config, self._files, self._limit = config, files, limit
        self._make_tokenizer = tokenizer
        self._cursor, self._position = self._rows(), 0

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        return self._make_tokenizer()

    @cached_property
    def switch(self) -> str | None:
        """The template's variable that turns thinking on and off."""
        names = TemplateSource(self.tokenizer.template).names
        found = next((name for name in _SWITCHES if name in names), None)
        if found is None and self._config.regenerate.thinking != "template":
            raise ConfigError(
                "the chat template has no variable that turns thinking on or off",
                where="regenerate.thinking",
                hint=f"leave it out; it would be one of {', '.join(_SWITCHES)}",
            )
        return found

    def scan(self) -> tuple[list[int], int]:
        """The places of rows that are conversations, and how many others there are.

        :raises DataError: a row cannot be read, with ``data.on_bad_row: stop``.
        """
        places, unusable = [], 0
        for place, row in enumerate(self._rows()):
            if isinstance(row, BadRow):
                if self._config.data.on_bad_row == "stop":
                    raise row.error
                unusable += 1
            elif _is_dialogue(row):
                places.append(place)
            else:
                unusable += 1
        if not places:
            raise DataError("no row is a conversation with an answer", where=self._files[0].name, hint="see data check")
        return places, unusable

    def dialogues(self, first: int, count: int) -> list[tuple[int, Dialogue]]:
        """The conversations among so many rows."""
        if first < self._position:  # what came back from a dead process
            self._cursor, self._position = self._rows(), 0
        found = []
        while self._position < first + count:
            row = next(self._cursor, None)
            if row is None:
                break
            if self._position >= first and isinstance(row, SourceRow) and _is_dialogue(row):
                found.append((self._position, self._dialogue(row)))
            self._position += 1
        return found

    def _rows(self) -> Iterator[SourceRow | BadRow]:
        rows = read_rows(self._files, self._config.data.mapping)
        return itertools.islice(rows, self._limit)

    def _dialogue(self, row: SourceRow) -> Dialogue:
        assert row.conversation is not None
        return Dialogue(row.prompt_id, row.conversation, last_only=self._config.regenerate.turns == "last")

    def request(self, dialogue: Dialogue) -> GenerationRequest:
        data, conversation = self._config.data, dialogue.conversation
        arguments = {**data.template_arguments, **conversation.template_arguments, **self._thinking(dialogue.prompt_id)}
        input_ids: Sequence[int] = ()
        if not self._config.regenerate.servers:
            text = self.tokenizer.render(
                _as_shown(dialogue.messages),
                add_generation_prompt=True,
                tools=conversation.tools,
                arguments=arguments,
                date=data.date,
            ).text
            input_ids = self.tokenizer.encode(text).input_ids
        return GenerationRequest(
            request_id=f"{dialogue.prompt_id}/{dialogue.turn}",
            messages=_as_shown(dialogue.messages),
            tools=conversation.tools,
            arguments=arguments,
            input_ids=input_ids,
            seed=_number(self._config.run.seed, dialogue.prompt_id, dialogue.turn),
        )

    def _thinking(self, prompt_id: str) -> dict[str, bool]:
        wanted = self._config.regenerate.thinking
        if wanted == "template" or self.switch is None:
            return {}
        on = wanted == "on" or (wanted == "mixed" and _number("thinking", prompt_id) % 2 == 1)
        return {self.switch: on}


def _is_dialogue(row: SourceRow) -> bool:
    messages: Sequence[Mapping[str, Any]] = row.conversation.messages if row.conversation is not None else ()
    return any(message.get("role") == "assistant" for message in messages)


def _as_shown(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _number(*parts: object) -> int:
    """The same number for the same parts, everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:4])
