# SPDX-License-Identifier: Apache-2.0
"""The target's tokenizer and chat template, through transformers. Only fast tokenizers: slow ones give no offsets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specforge_core.contracts import DataError, EncodedText, TargetError
from specforge_core.contracts.kinds import shorten

from specforge_hf_target.chat_template import render_template
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.model_files import check_text_files, refusing

Span = tuple[int, int]

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
        content = self._tokenizer.backend_tokenizer.to_str() + "\0" + self._template(required=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def special_token_ids(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(self._tokenizer.all_special_ids) | {index for index, token in added if token.special}

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        text, _ = self._render(messages, add_generation_prompt=add_generation_prompt)
        return text

    def encode(self, text: str) -> EncodedText:
        # verbose=False: a text beyond the model's length is cut later, and that is no warning's business
        with refusing("the tokenizer cannot encode this text", hint="leave the text out", kind=DataError):
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return EncodedText(encoded["input_ids"], encoded["offset_mapping"])

    def encode_with_assistant_mask(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        template = self._template(required=True)
        if not _MARKS_ASSISTANT.search(template):
            return None
        # Not apply_chat_template(return_assistant_tokens_mask=True): where a turn begins with a space that the
        # tokenizer trims from its offsets, that leaves this turn and all later ones out, silently.
        text, [spans] = self._render(messages, return_assistant_tokens_mask=True)
        encoded = self.encode(text)
        return encoded.input_ids, _mark_spans(encoded.offsets, spans)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids))

    def _render(self, messages: Sequence[Mapping[str, str]], **options: bool) -> tuple[str, list[list[Span]]]:
        template = self._template(required=True)
        return render_template(template, messages, tokens=self._tokenizer.special_tokens_map, **options)

    def _template(self, *, required: bool) -> str:
        """The chat template; "" if there is none and none is required."""
        template = self._tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if required and not template:
            raise DataError(
                "the tokenizer has no chat template",
                where=self._where,
                hint="add chat_template.jinja beside it, or give prompts as input_ids and loss_mask",
            )
        if template and not isinstance(template, str):
            raise TargetError(
                f"the chat template is {shorten(template)}, which is no text",
                where=self._where,
                hint="correct chat_template in tokenizer_config.json",
            )
        return template or ""


def _mark_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for every token that overlaps one of the character spans; both are sorted."""
    mask, token = [0] * len(offsets), 0
    for start, end in spans:
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        while token < len(offsets) and offsets[token][0] < end:
            mask[token] = 1
            token += 1
    return mask


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
    return HfChatTokenizer(tokenizer, where)
