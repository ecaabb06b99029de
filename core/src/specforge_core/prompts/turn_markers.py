# SPDX-License-Identifier: Apache-2.0
"""What a chat template puts around an assistant turn, found out by rendering a conversation we know.

A template is a program; it cannot be read, but it can be asked. The header is what ``add_generation_prompt`` appends,
as far as it also stands before the answers of past turns (templates for reasoning models append more, or write an
empty thinking block that past turns lack); where nothing is appended, it is what stands between question and answer.
The end is what follows every answer, up to its first special token.
"""

from __future__ import annotations

from dataclasses import dataclass

from specforge_core.contracts import ChatTokenizer, DataError

_QUESTIONS = ("first probing question", "second probing question")
_ANSWERS = ("first probing answer", "second probing answer")


@dataclass(frozen=True, slots=True)
class TurnMarkers:
    """Text around the content of every assistant turn. The end may be empty, the header may not."""

    header: str
    end: str


def find_turn_markers(tokenizer: ChatTokenizer) -> TurnMarkers:
    """:raises DataError: the template does not render a plain conversation turn by turn."""
    turns = [
        {"role": "user", "content": _QUESTIONS[0]},
        {"role": "assistant", "content": _ANSWERS[0]},
        {"role": "user", "content": _QUESTIONS[1]},
        {"role": "assistant", "content": _ANSWERS[1]},
    ]
    text = tokenizer.render(turns, add_generation_prompt=False)
    headers = []
    for asked in (1, 3):
        plain = tokenizer.render(turns[:asked], add_generation_prompt=False)
        prompted = tokenizer.render(turns[:asked], add_generation_prompt=True)
        question, answer = text.rfind(_QUESTIONS[asked // 2]), text.find(_ANSWERS[asked // 2])
        if not 0 <= question < answer or not prompted.startswith(plain) or not text.startswith(plain):
            raise _not_in_turns()
        if prompted == plain:
            headers.append(text[question + len(_QUESTIONS[asked // 2]) : answer])
        else:
            headers.append(_common_prefix(prompted[len(plain) :], text[len(plain) : answer]))
    header = _common_prefix(*headers)
    if not header.strip():
        raise _not_in_turns()
    after = [text[text.find(_ANSWERS[0]) + len(_ANSWERS[0]) : text.find(_QUESTIONS[1])]]
    after.append(text[text.find(_ANSWERS[1]) + len(_ANSWERS[1]) :])
    return TurnMarkers(header, _cut_after_special(_common_prefix(*after), tokenizer))


def _not_in_turns() -> DataError:
    return DataError(
        "the chat template does not render turns one after the other, so trained tokens cannot be told",
        where="chat template",
        hint="mark answers in it with {% generation %}, or give prompts as input_ids and loss_mask",
    )


def _common_prefix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _cut_after_special(end: str, tokenizer: ChatTokenizer) -> str:
    encoded = tokenizer.encode(end)
    for token_id, (_, stop) in zip(encoded.input_ids, encoded.offsets, strict=True):
        if token_id in tokenizer.special_token_ids:
            return end[:stop]
    return end
