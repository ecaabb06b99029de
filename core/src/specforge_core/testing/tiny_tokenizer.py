# SPDX-License-Identifier: Apache-2.0
"""The tiny target's tokenizer: one token per UTF-8 byte, and three special ones. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from specforge_core.contracts import EncodedText
from specforge_core.testing.tiny_plugin import BOS, NUM_BYTES, TURN_END, TURN_START, TinyTargetConfig

_SPECIAL = {"<|bos|>": BOS, "<|turn|>": TURN_START, "<|end|>": TURN_END}
_PIECES = re.compile("(" + "|".join(re.escape(text) for text in _SPECIAL) + ")")


class TinyTokenizer:
    """A ``ChatTokenizer``. Its template gives ``<|turn|>role`` newline, content, ``<|end|>`` for each turn.

    :param marks_assistant: whether it offers the template's own assistant mask.
    """

    def __init__(self, *, marks_assistant: bool = False):
        self._marks_assistant = marks_assistant

    @property
    def fingerprint(self) -> str:
        return "tiny-bytes-1"

    @property
    def special_token_ids(self) -> frozenset[int]:
        return frozenset(_SPECIAL.values())

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        turns = [f"<|turn|>{message['role']}\n{message['content']}<|end|>" for message in messages]
        return "<|bos|>" + "".join(turns) + ("<|turn|>assistant\n" if add_generation_prompt else "")

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
        return EncodedText(token_ids, offsets)

    def encode_with_assistant_mask(
        self, messages: Sequence[Mapping[str, str]]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        if not self._marks_assistant:
            return None
        token_ids: list[int] = [BOS]
        mask = [0]
        for message in messages:
            header = self.encode(f"<|turn|>{message['role']}\n").input_ids
            body = self.encode(f"{message['content']}<|end|>").input_ids
            token_ids += [*header, *body]
            mask += [0] * len(header) + [int(message["role"] == "assistant")] * len(body)
        return token_ids, mask

    def decode(self, token_ids: Sequence[int]) -> str:
        names = {token_id: text for text, token_id in _SPECIAL.items()}
        raw = b"".join(bytes([i]) if i < NUM_BYTES else names.get(i, "").encode() for i in token_ids)
        return raw.decode(errors="replace")


def load_tokenizer(config: TinyTargetConfig) -> TinyTokenizer:
    """The tokenizer of every tiny target."""
    return TinyTokenizer()
