# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer and chat template, through transformers. Only fast tokenizers: slow ones give no offsets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from specforge_core.contracts import DataError, EncodedText, TargetError

from specforge_hf_target.config import HfTargetConfig

_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class HfChatTokenizer:
    """A ``ChatTokenizer`` over a fast tokenizer that has a chat template."""

    def __init__(self, tokenizer: Any, where: str):
        if not tokenizer.is_fast:
            raise TargetError(
                "the tokenizer is a slow one, which cannot say where its tokens stand in the text",
                where=where,
                hint="convert it to a tokenizer.json, or give prompts as input_ids and loss_mask",
            )
        self._tokenizer = tokenizer
        self._where = where

    @property
    def fingerprint(self) -> str:
        content = self._tokenizer.backend_tokenizer.to_str() + "\0" + (self._template(required=False) or "")
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def special_token_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {index for index, token in added if token.special}

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        self._template(required=True)
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                hint="roles must come as the template wants them",
            ) from error

    def encode(self, text: str) -> EncodedText:
        # verbose=False: a text beyond the model's length is cut later, and that is no warning's business
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return EncodedText(encoded["input_ids"], encoded["offset_mapping"])

    def encode_with_assistant_mask(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        if not _MARKS_ASSISTANT.search(self._template(required=True) or ""):
            return None
        try:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                hint="roles must come as the template wants them",
            ) from error
        return encoded["input_ids"], encoded["assistant_masks"]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))

    def _template(self, *, required: bool) -> str | None:
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if required and template is None:
            raise DataError(
                "the tokenizer has no chat template",
                where=self._where,
                hint="add chat_template.jinja beside it, or give prompts as input_ids and loss_mask",
            )
        return template


def load_tokenizer(config: HfTargetConfig) -> HfChatTokenizer:
    """The tokenizer that belongs to the target.

    :raises TargetError: the target has none, or a slow one.
    """
    from transformers import AutoTokenizer

    where = f"target.path {config.path}"
    config.read_config()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, KeyError, ImportError, OSError, TypeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TargetError(
            f"the tokenizer cannot be loaded: {first}",
            where=where,
            hint="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        ) from error
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        # transformers answers missing files with an empty tokenizer of the model's kind
        raise TargetError(
            "the tokenizer cannot be loaded: its vocabulary is empty or missing",
            where=where,
            hint="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        )
    return HfChatTokenizer(tokenizer, where)
