# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer and chat template, through transformers. Only fast tokenizers: slow ones give no offsets."""

from __future__ import annotations

import copy
import datetime
import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from specforge_core.contracts import DataError, EncodedText, RenderedText, TargetError
from specforge_core.contracts.kinds import shorten

from specforge_hf_target.chat_template import render_template
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.model_files import check_text_files, refusing


class _EncodedText:
    """What the tokenizer made of a text; asked for single places, which costs less than the offsets of all tokens."""

    def __init__(self, encoding: Any):
        self._encoding = encoding
        self.input_ids: list[int] = encoding.ids

    def tokens_between(self, start: int, end: int) -> tuple[int, int]:
        first = self._token_of(range(start, end))
        last = self._token_of(range(end - 1, start - 1, -1))
        if first is None or last is None:
            return 0, 0
        stop = last + 1
        while stop < len(self.input_ids) and (self._encoding.token_to_chars(stop) or (end,))[0] < end:
            stop += 1  # further tokens of one character
        return first, stop

    def _token_of(self, characters: range) -> int | None:
        """The token of the first of the characters that has one: some tokenizers trim spaces from their offsets."""
        found = (self._encoding.char_to_token(position) for position in characters)
        return next((token for token in found if token is not None), None)


class HfChatTokenizer:
    """A ``ChatTokenizer`` over a fast tokenizer that has a chat template."""

    def __init__(self, tokenizer: Any, where: str, *, stop_token_ids: Collection[int] = ()):
        if not tokenizer.is_fast:
            raise TargetError(
                "the tokenizer is a slow one, which cannot say where its tokens stand in the text",
                where=where,
                hint="convert it to a tokenizer.json, or give prompts as input_ids and loss_mask",
            )
        self._tokenizer = tokenizer
        self._where = where
        self._stop_token_ids = frozenset(stop_token_ids)
        # Its own copy, for whoever else uses the tokenizer: a text beyond the model's length is cut later.
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._encoder.no_truncation()
        self._encoder.no_padding()

    @property
    def fingerprint(self) -> str:
        content = "\0".join([self._tokenizer.backend_tokenizer.to_str(), *self._templates().values()])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def special_token_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {index for index, token in added if token.special}

    @property
    def stop_token_ids(self) -> frozenset[int]:
        ids = {self._tokenizer.eos_token_id, *self._stop_token_ids}
        return frozenset(token_id for token_id in ids if token_id is not None)

    @property
    def template(self) -> str:
        return "\n".join(self._templates().values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> RenderedText:
        variables = {
            **self._tokenizer.special_tokens_map,
            **(arguments or {}),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_template(self._template_for(tools), messages, variables=variables, date=date)

    def encode(self, text: str) -> EncodedText:
        with refusing("the tokenizer cannot encode this text", hint="leave the text out", kind=DataError):
            return _EncodedText(self._encoder.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def _template_for(self, tools: object) -> str:
        """The template for conversations with or without tools, where the tokenizer has several."""
        templates = self._templates()
        chosen = (templates.get("tool_use") if tools is not None else None) or templates.get("default")
        if not chosen:
            raise DataError(
                "the tokenizer has no chat template",
                where=self._where,
                hint="add chat_template.jinja beside it, or give prompts as input_ids and loss_mask",
            )
        return chosen

    def _templates(self) -> dict[str, str]:
        """The chat templates by name."""
        given = self._tokenizer.chat_template or {}
        templates = given if isinstance(given, dict) else {"default": given}
        for name, template in templates.items():
            if not isinstance(template, str):
                raise TargetError(
                    f"the chat template {name} is {shorten(template)}, which is no text",
                    where=self._where,
                    hint="correct chat_template in tokenizer_config.json",
                )
        return templates


def load_tokenizer(config: HfTargetConfig) -> HfChatTokenizer:
    """The tokenizer that belongs to the target. None of its files is run, and nobody is asked whether one may be.

    :raises TargetError: the target has none, or a slow one.
    """
    from transformers import AutoTokenizer

    where = f"target.path {config.path}"
    hint = "put the model's tokenizer.json and tokenizer_config.json beside its config.json"
    config.read_config()
    check_text_files(config.path)
    with refusing("the tokenizer cannot be loaded", where=where, hint=hint):
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        known = tokenizer("text", add_special_tokens=False)["input_ids"]
    if not known:  # transformers answers missing files with an empty tokenizer of the model's kind
        raise TargetError("the tokenizer cannot be loaded: its vocabulary is empty or missing", where=where, hint=hint)
    return HfChatTokenizer(tokenizer, where, stop_token_ids=config.describe().eos_token_ids)
