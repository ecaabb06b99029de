# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates that render thoughts, each in its way, and of those that mark answers themselves.

What the generation prompt opens is never trained, nor an empty block, nor a lone end of thinking.
"""

from __future__ import annotations

from collections.abc import Iterator

from oracles_short import chatml
from talk import NO, YES, Message, Piece, Talk, headerless, template


def _last_question(talk: Talk) -> int:
    return max((index for index, message in enumerate(talk.messages) if message.role == "user"), default=-1)


def _taken_apart(message: Message) -> tuple[str, str]:
    """Thought and answer of a turn that may hold its thought in its content."""
    if message.thought or "</think>" not in message.content:
        return message.thought.strip("\n"), message.content
    thought, _, text = message.content.partition("</think>")
    return thought.removeprefix("<think>").strip("\n"), text.lstrip("\n")


@template(
    "<|im_start|> <|im_end|>",
    "<|im_end|>",
    thoughts=True,
    thoughts_in_content=True,
    arguments=({}, {"enable_thinking": False}),
)
def think_last(talk: Talk) -> Iterator[Piece]:
    asked, count = _last_question(talk), len(talk.messages)
    off = talk.arguments.get("enable_thinking") is False
    for index, message in enumerate(talk.messages):
        yield f"<|im_start|>{message.role}\n", NO
        thought, text = _taken_apart(message) if message.answers else ("", message.content)
        if message.answers and index > asked and (thought or index == count - 1):
            if thought and off:
                yield "<think>\n", NO
                yield f"{thought}\n</think>\n\n", YES
            else:
                yield f"<think>\n{thought}\n</think>\n\n", bool(thought)
            text = text.lstrip("\n")
        yield text + "<|im_end|>", message.answers
        yield "\n", NO


@template("<|im_start|> <|im_end|>", "<|im_end|>", thoughts=True, thoughts_in_content=True)
def think_opened(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages, 1):
        yield f"<|im_start|>{message.role}\n", NO
        text = message.content
        if message.answers and index < len(talk.messages):
            text = text.split("</think>")[-1].lstrip("\n")
        elif message.answers and message.thought:
            yield "<think>\n", NO
            yield message.thought + "\n</think>\n\n", YES
        elif message.answers and text.startswith("<think>\n"):
            yield "<think>\n", NO
            text = text.removeprefix("<think>\n")
        yield text + "<|im_end|>", message.answers
        yield "\n", NO


@template("<|begin|> <|finish|>", "<|finish|>", thoughts=True)
def think_closed(talk: Talk) -> Iterator[Piece]:
    """Where the row has a thought, the prompt has the beginning of its block."""
    for index, message in enumerate(talk.messages, 1):
        yield f"<|begin|>{message.role}\n", NO
        if message.answers and message.thought:
            yield "<think>\n", NO
            yield message.thought + "\n</think>\n", YES
        elif message.answers and index == len(talk.messages):
            yield "<think>\n\n</think>\n", NO
        yield message.content + "<|finish|>", message.answers


@template(
    "<seed:bos> <seed:eos> <seed:think> </seed:think>",
    "<seed:eos>",
    bos="<seed:bos>",
    thoughts=True,
    needs_eos=True,
)
def think_always(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<seed:bos>{message.role}\n", NO
        if message.answers and message.thought:
            yield f"<seed:think>{message.thought}</seed:think>", YES
        yield message.content + "<seed:eos>", message.answers


@template("<|user|> <|assistant|> <|system|> <|end|>", "<|end|>", thoughts=True, thoughts_in_content=True)
def think_never(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>", NO
        text = message.content.split("</think>")[-1] if message.answers else message.content
        yield text + "<|end|>", message.answers


@template(
    "<bos> <|User|> <|Assistant|> <eos>",
    "<eos>",
    bos="<bos>",
    needs_eos=True,
    thoughts=True,
    thoughts_in_content=True,
    arguments=({}, {"thinking": True}),
)
def think_lone_close(talk: Talk) -> Iterator[Piece]:
    yield "<bos>", NO
    last = ""
    for index, message in enumerate(talk.messages):
        if message.answers:
            yield "<|Assistant|></think>" if last == "user" else "", NO
            yield message.content.split("</think>", 1)[-1] + "<eos>", headerless(talk, index)
        else:
            yield "<|User|>" if message.role == "user" else "", NO
            yield message.content, NO
        last = message.role


@template(
    "[gMASK] <sop> <|user|> <|assistant|> <|system|> <|endoftext|>",
    "<|endoftext|> <|user|>",
    thoughts=True,
    arguments=({}, {"enable_thinking": False}),
)
def think_block_always(talk: Talk) -> Iterator[Piece]:
    """The plain prompt ends before the newline, so the model writes that and the block of a thought that it has."""
    yield "[gMASK]<sop>", NO
    off, answered = talk.arguments.get("enable_thinking") is False, False
    for message in talk.messages:
        yield f"<|{message.role}|>", answered
        answered = message.answers
        text = message.content
        if not answered:
            yield f"\n{text}" + ("/nothink" if off and message.role == "user" else ""), NO
            continue
        if message.thought and off:
            yield "\n<think>", NO
            yield f"{message.thought.strip()}</think>", YES
        elif message.thought:
            yield f"\n<think>{message.thought.strip()}</think>", YES
        else:
            yield "\n", NO if off else None
            yield "<think></think>", NO
        if text.strip():
            yield "\n", None
            yield text.strip(), YES


@template("<|im_start|> <|im_end|>", "<|im_end|>")
def think_by_system(talk: Talk) -> Iterator[Piece]:
    first, turns, off = talk.messages[0], talk.messages, False
    if first.role == "system":
        off, turns = "/no_think" in first.content, talk.messages[1:]
        yield f"<|im_start|>system\n{first.content.replace('/no_think', '').rstrip()}<|im_end|>\n", NO
    else:
        yield "<|im_start|>system\nReasoning: on<|im_end|>\n", NO
    for turn in turns:
        yield f"<|im_start|>{turn.role}\n", NO
        yield "<think>\n\n</think>\n" if off and turn.answers else "", NO
        yield turn.content + "<|im_end|>", turn.answers
        yield "\n", NO


@template(
    "<|TURN|> <|CHATBOT|> <|USER|> <|SYSTEM|> <|THINK|> <|/THINK|> <|RESPONSE|> <|/RESPONSE|> <|/TURN|>",
    stops="<|/TURN|>",
    thoughts=True,
)
def thinking_key(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages, 1):
        if message.answers:
            yield "<|TURN|><|CHATBOT|>", NO
            if message.thought and index == len(talk.messages):
                yield f"<|THINK|>{message.thought}<|/THINK|>", YES
            yield f"<|RESPONSE|>{message.content}<|/RESPONSE|><|/TURN|>", YES
        else:
            yield f"<|TURN|><|{message.role.upper()}|>{message.content}<|/TURN|>", NO


@template("<|bot|> <|eot|>", "<|eot|>", thoughts=True)
def no_end_after_thought(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|bot|>{message.role}\n", NO
        yield f"<think>{message.thought}</think>" if message.thought else "", YES
        yield message.content + "<|eot|>" if message.content else "", message.answers


@template(
    "[|user|] [|assistant|] [|system|] [|endofturn|]",
    "[|endofturn|]",
    thoughts=True,
    arguments=({}, {"keep_thoughts": True}),
)
def question_in_thought(talk: Talk) -> Iterator[Piece]:
    keep = bool(talk.arguments.get("keep_thoughts"))
    for index, message in enumerate(talk.messages, 1):
        if message.answers:
            last = index == len(talk.messages)
            yield "[|assistant|]\n", NO
            if message.thought and (last or keep):
                yield "<think>\n", not keep
                yield message.thought.strip() + "\n</think>\n\n", YES
            elif last:
                yield "<think>\n\n</think>\n\n", NO
            yield message.content.strip() + "[|endofturn|]", YES
            yield "\n", NO
        else:
            yield f"[|{message.role}|]\n{message.content}", NO
            yield "[|endofturn|]\n" if message.role == "system" else "\n", NO


def _as_chatml(name: str) -> None:
    def oracle(talk: Talk) -> Iterator[Piece]:
        return chatml(talk)

    oracle.__name__ = name
    template("<|im_start|> <|im_end|>", "<|im_end|>")(oracle)


for _name in ("marks_right", "marks_in_a_comment", "marks_lose_the_end", "marks_cover_all", "marks_cover_the_header"):
    _as_chatml(_name)
