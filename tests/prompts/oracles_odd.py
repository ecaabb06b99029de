# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates that rewrite texts, look into them, or share turns among messages."""

from __future__ import annotations

from collections.abc import Iterator

from talk import EITHER, NO, YES, Piece, Talk, dumps, headerless, template


@template("<|endoftext|>", "<|endoftext|>")
def text_rewritten(talk: Talk) -> Iterator[Piece]:
    """Nothing ends an answer but an empty line, which may be trained."""
    names = {"user": "User", "assistant": "Assistant", "system": "System"}
    for message in talk.messages:
        yield names[message.role] + ":", NO
        yield " ", EITHER if message.answers else NO
        text = message.content.strip().replace("\r\n", "\n").replace("\n\n", "\n")
        yield text, message.answers
        yield "\n\n", EITHER if message.answers else NO


@template("<|startoftext|> <|extra_0|> <|extra_4|> <|eos|>", "<|eos|>")
def question_closed(talk: Talk) -> Iterator[Piece]:
    before = ""
    for index, message in enumerate(talk.messages):
        if message.role == "system":
            yield f"<|startoftext|>{message.content}<|extra_4|>", NO
        elif message.role == "user":
            opening = "" if index == 1 and before == "system" else "<|startoftext|>"
            yield f"{opening}{message.content}<|extra_0|>", NO
        else:
            yield message.content + "<|eos|>", headerless(talk, index)
        before = message.role


@template("<|user|> <|assistant|> <|system|> <|end|>", "<|end|>")
def prompt_after_user_only(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>\n", NO
        yield message.content + "<|end|>", message.answers
        yield "\n", NO


@template("<|human|> <|bot|> <|sys|> <|end|>", "<|end|>", tools=True)
def merged_turns(talk: Talk) -> Iterator[Piece]:
    """What joins two answers in one turn may be trained."""
    sides = {"assistant": "bot", "system": "sys"}
    last = ""
    for message in talk.messages:
        side = sides.get(message.role, "human")
        if side == last:
            yield "\n", EITHER if message.answers else NO
        else:
            yield "<|end|>" if last else "", last == "bot"
            yield f"<|{side}|>", NO
        last = side
        yield f"<result>{message.content}</result>" if message.role == "tool" else message.content, message.answers
        for call in message.calls:
            made = dumps({"name": call.name, "arguments": call.arguments})
            yield f"<tool_call>{made}</tool_call>", YES
    yield "<|end|>", last == "bot"


@template("<|user|> <|assistant|> <|system|> <|end|>", "<|end|>")
def ensured_newline(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>", NO
        ending = "<|end|>" if message.content.endswith("\n") else "\n<|end|>"
        yield message.content + ending, message.answers


@template("<|user|> <|assistant|> <|system|> <|stop|> <|end|>", "<|end|> <|stop|>")
def length_told(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        long = len(message.content) > 20
        yield f"<|{message.role}|>" + ("(long)\n" if long and not message.answers else "\n"), NO
        yield message.content + ("<|end|>" if long else "<|stop|>"), message.answers
