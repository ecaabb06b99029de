# SPDX-License-Identifier: Apache-2.0
"""The tiny target's tokenizer: one token per UTF-8 byte, and three special ones. Standard library only."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from specforge_core.contracts import EncodedText, RenderedText, TextWithOffsets
from specforge_core.testing.tiny_plugin import BOS, NUM_BYTES, TURN_END, TURN_START, TinyTargetConfig

_SPECIAL = {"<|bos|>": BOS, "<|turn|>": TURN_START, "<|end|>": TURN_END}
_PIECES = re.compile("(" + "|".join(re.escape(text) for text in _SPECIAL) + ")")


class TinyTokenizer:
    """A ``ChatTokenizer``. Its template gives ``<|turn|>role`` newline, content, ``<|end|>`` for each turn.

    :param marks_assistant: whether it gives marks of its own for the assistant's text.
    """

    template = ""

    def __init__(self, *, marks_assistant: bool = False):
        self._marks_assistant = marks_assistant

    @property
    def fingerprint(self) -> str:
        return "tiny-bytes-1"

    @property
    def special_token_ids(self) -> frozenset[int]:
        return frozenset(_SPECIAL.values())

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset({TURN_END})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> RenderedText:
        text, marked = "<|bos|>", []
        for message in messages:
            text += f"<|turn|>{message['role']}\n"
            start = len(text)
            text += f"{message['content']}<|end|>"
            if message["role"] == "assistant":
                marked.append((start, len(text)))
        text += "<|turn|>assistant\n" if add_generation_prompt else ""
        return RenderedText(text, marked if self._marks_assistant else None)

    def encode(self, text: str) -> EncodedText:
        token_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for piece in _PIECES.split(text):
            if piece in _SPECIAL:
                token_ids.append(_SPECIAL[piece])
                offsets.append((position, position + len(piece)))
            else:
                for place, character in enumerate(piece, start=position):
                    encoded = character.encode()
                    token_ids.extend(encoded)
                    offsets.extend([(place, place + 1)] * len(encoded))
            position += len(piece)
        return TextWithOffsets(token_ids, offsets)

    def decode(self, token_ids: Sequence[int]) -> str:
        names = {token_id: text for text, token_id in _SPECIAL.items()}
        raw = b"".join(bytes([i]) if i < NUM_BYTES else names.get(i, "").encode() for i in token_ids)
        return raw.decode(errors="replace")


def load_tokenizer(config: TinyTargetConfig) -> TinyTokenizer:
    """The tokenizer of every tiny target."""
    return TinyTokenizer()
