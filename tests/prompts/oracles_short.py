# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates with special tokens around turns, without tools and thoughts."""

from __future__ import annotations

from collections.abc import Iterator

from talk import EITHER, NO, YES, Piece, Refused, Talk, headerless, hoisted, refuse_unless_in_turn, template


@template("<|im_start|> <|im_end|>", "<|im_end|>")
def chatml(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|im_start|>{message.role}\n", NO
        yield message.content + "<|im_end|>", message.answers
        yield "\n", NO


@template("<|im_start|> <|im_end|>", "<|im_end|>")
def chatml_default_system(talk: Talk) -> Iterator[Piece]:
    if talk.messages[0].role != "system":
        yield "<|im_start|>system\nAn assistant who is glad to help.<|im_end|>\n", NO
    yield from chatml(talk)


@template("<s> <|im_start|> <|im_end|>", "<|im_end|>", bos="<s>")
def bos_chatml(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    for message in talk.messages:
        yield f"<|im_start|>{message.role}\n", NO
        yield message.content.rstrip() + "<|im_end|>", message.answers
        yield "\n", NO


@template("<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|>", "<|im_end|>")
def middle_token(talk: Talk) -> Iterator[Piece]:
    if talk.messages[0].role != "system":
        yield "<|im_system|>system<|im_middle|>Be of use.<|im_end|>", NO
    for message in talk.messages:
        yield f"<|im_{message.role}|>{message.role}<|im_middle|>", NO
        yield message.content + "<|im_end|>", message.answers


@template("<s> </s> [INST] [/INST]", "</s>", bos="<s>", order="turns", needs_eos=True)
def llama2(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    refuse_unless_in_turn(turns)
    for index, turn in enumerate(turns):
        if turn.answers:
            yield " ", EITHER
            yield f"{turn.content.strip()} </s>", YES
        else:
            folded = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and index == 0 else ""
            yield "<s>[INST] " + (folded + turn.content).strip() + " [/INST]", NO


@template("<s> </s> [INST] [/INST]", "</s>", bos="<s>")
def inst_plain(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    for index, turn in enumerate(talk.messages):
        if turn.role == "user":
            yield f"[INST]{turn.content}[/INST]", NO
        elif turn.answers:
            yield turn.content + "</s>", headerless(talk, index)


@template("<s> </s> [INST] [/INST]", "</s>", bos="<s>")
def inst_system_last(talk: Talk) -> Iterator[Piece]:
    last = max((index for index, turn in enumerate(talk.messages) if turn.role == "user"), default=-1)
    system = f"{talk.messages[0].content}\n\n" if talk.messages[0].role == "system" else ""
    yield "<s>", NO
    for index, turn in enumerate(talk.messages):
        if turn.role == "user":
            yield f"[INST] {system if index == last else ''}{turn.content}[/INST]", NO
        elif turn.answers:
            yield " ", EITHER
            yield turn.content + "</s>", headerless(talk, index)


@template("<s> <|head|> <|/head|> <|eot|>", "<|eot|>", bos="<s>")
def llama3(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    for message in talk.messages:
        yield f"<|head|>{message.role}<|/head|>\n\n", NO
        yield message.content.strip() + "<|eot|>", message.answers


@template("<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>", bos="<bos>", order="turns")
def gemma(talk: Talk) -> Iterator[Piece]:
    if talk.messages[0].role == "system":
        raise Refused("system")
    refuse_unless_in_turn(talk.messages)
    yield "<bos>", NO
    for message in talk.messages:
        yield f"<start_of_turn>{'model' if message.answers else 'user'}\n", NO
        yield message.content.strip() + "<end_of_turn>", message.answers
        yield "\n", NO


@template("<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>", bos="<bos>", content="")
def gemma_system(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    yield "<bos>", NO
    for index, turn in enumerate(turns):
        yield f"<start_of_turn>{'model' if turn.answers else turn.role}\n", NO
        if index == 0 and talk.messages[0].role == "system":
            yield system + "\n\n", NO
        led = index == 0 and talk.messages[0].role == "system"  # no prompt ends with a system text
        yield turn.content.strip() + "<end_of_turn>", EITHER if led and turn.answers else turn.answers
        yield "\n", NO


@template("<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>", "<|endoftext|> <|end|>", needs_eos=True)
def phi3(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>\n", NO
        yield message.content + "<|end|>", message.answers
        yield "\n", NO
    yield "<|endoftext|>", NO


@template("<|im_start|> <|im_sep|> <|im_end|>", "<|im_end|>")
def phi4(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|im_start|>{message.role}<|im_sep|>", NO
        yield message.content + "<|im_end|>", message.answers
