# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates that differ in headers, ends and what they do to texts, without tools and thoughts.

Where no token ends an answer, space that the template writes after it may be trained or not.
"""

from __future__ import annotations

from collections.abc import Iterator

from talk import EITHER, NO, YES, Piece, Refused, Talk, headerless, hoisted, template


@template("<|user|> <|assistant|> <|system|> </s>", "</s>", needs_eos=True)
def zephyr(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>\n", NO
        yield message.content + "</s>", message.answers
        yield "\n", NO


@template("</s>", "</s>")
def vicuna(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    yield (system if talk.messages[0].role == "system" else "A chat between a user and an assistant.") + "\n\n", NO
    for turn in turns:
        if turn.answers:
            yield "ASSISTANT:", NO
            yield " ", EITHER
            yield turn.content + "</s>", YES
        else:
            yield f"USER: {turn.content} ", NO


@template("</s>", "</s>", needs_eos=True)
def alpaca(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages, 1):
        if message.role == "user":
            yield f"### Instruction:\n{message.content}\n\n", NO
        elif message.answers:
            yield "### Response:\n", NO
            yield message.content.rstrip(), YES
            yield message.content[len(message.content.rstrip()) :], EITHER if index < len(talk.messages) else YES
            yield from [("</s>", YES)] if index == len(talk.messages) else [("\n\n", EITHER)]
        else:
            yield message.content + "\n\n", NO


@template("</s>", "</s>")
def numbered_rounds(talk: Talk) -> Iterator[Piece]:
    number = 0
    for message in talk.messages:
        if message.role == "user":
            number += 1
            yield f"[Round {number}]\n\n问：{message.content}\n\n答：", NO
        elif message.answers:
            yield message.content, YES if number else EITHER
            yield "\n\n", EITHER


@template("<|ask|> <|answer|> </s>", "</s> <|ask|>")
def no_ends(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    yield system, NO
    answered = False
    for index, turn in enumerate(turns, 1):
        yield "<|ask|>" if turn.role == "user" else "<|answer|>", answered
        yield turn.content, turn.answers
        answered = turn.answers
        yield "</s>" if answered and index == len(turns) else "", YES


@template("[gMASK] <sop> <|user|> <|assistant|> <|system|> <|endoftext|>", "<|endoftext|> <|user|>")
def next_header(talk: Talk) -> Iterator[Piece]:
    yield "[gMASK]<sop>", NO
    answered = False
    for message in talk.messages:
        yield f"<|{message.role}|>", answered
        yield "\n", NO
        yield message.content, message.answers
        answered = message.answers


@template("<|turn|> <|turn_end|>", "<|turn_end|>")
def late_end(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages, 1):
        yield f"<|turn|>{message.role}\n", NO
        yield message.content, message.answers
        yield "<|turn_end|>" if index < len(talk.messages) else "", message.answers


@template("<|sep|> <|cls|>", "<|cls|>")
def separators(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        if message.role == "system":
            yield f"System: {message.content}\n", NO
        elif message.role == "user":
            yield f"User: {message.content}<|sep|>", NO
        else:
            yield "Assistant:", NO
            yield " ", EITHER
            yield message.content + "<|cls|>", YES


@template("<|turn|> <|bot|> <|user|> <|system|> <|say|> <|/say|> <|/turn|>", "<|/turn|>")
def two_ends(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield "<|turn|>", NO
        if message.answers:
            yield "<|bot|>", NO
            yield f"<|say|>{message.content}<|/say|><|/turn|>", YES
        else:
            yield f"<|{message.role}|>{message.content}<|/turn|>", NO


@template("<bos> <|a|> <|o|> <|stop|> <|eot|> <|eos|>", "<|eos|>", bos="<bos>")
def three_ends(talk: Talk) -> Iterator[Piece]:
    yield "<bos>", NO
    for message in talk.messages:
        if message.answers:
            yield "<|a|>\n", NO
            yield message.content + "\n<|stop|>\n<|eot|><|eos|>", YES
            yield "\n", NO
        else:
            yield f"<|o|>{message.role}\n{message.content}<|eot|>\n", NO


@template("<bos> <|User|> <|Assistant|> <eos>", "<eos>", bos="<bos>", needs_eos=True)
def hoisted_system(talk: Talk) -> Iterator[Piece]:
    yield "<bos>" + "\n\n".join(m.content for m in talk.messages if m.role == "system"), NO
    for message in talk.messages:
        if message.role == "user":
            yield "<|User|>" + message.content, NO
        elif message.answers:
            yield "<|Assistant|>", NO
            yield message.content + "<eos>", YES


@template("<|start_of_role|> <|end_of_role|> <|end_of_text|>", "<|end_of_text|>")
def system_needed(talk: Talk) -> Iterator[Piece]:
    if talk.messages[0].role != "system":
        raise Refused("no system text")
    for message in talk.messages:
        yield f"<|start_of_role|>{message.role}<|end_of_role|>", NO
        yield message.content + "<|end_of_text|>", message.answers
        yield "\n", NO


@template("<|im_start|> <|im_end|>", "<|im_end|>", developer=True)
def developer(talk: Talk) -> Iterator[Piece]:
    if any(message.role == "system" for message in talk.messages):
        raise Refused("system")
    for index, message in enumerate(talk.messages, 1):
        yield f"<|im_start|>{message.role}\n", NO
        yield message.content.strip() if index == len(talk.messages) else message.content, message.answers
        yield "<|im_end|>", message.answers
        yield "\n", NO


@template("<s> <|head|> <|/head|> <|eot|>", "<|eot|>", bos="<s>", arguments=({}, {"date_string": "the first of May"}))
def dated(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    day = talk.arguments.get("date_string", "29 February 2024")
    yield f"<s><|head|>system<|/head|>\n\nToday is {day}.\n{system.strip()}<|eot|>", NO
    for turn in turns:
        yield f"<|head|>{turn.role}<|/head|>\n\n", NO
        yield turn.content + "<|eot|>", turn.answers


@template("<s> <end_of_utterance>", "<end_of_utterance>", bos="<s>", content="parts")
def parts_only(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    for message in talk.messages:
        yield f"{message.role.capitalize()}:", NO
        yield " ", EITHER if message.answers else NO
        yield message.content + "<end_of_utterance>", message.answers
        yield "\n", NO


@template("<|im_start|> <|im_end|>", "<|im_end|>", content="parts")
def parts_first(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|im_start|>{message.role}\n", NO
        yield message.content + "<|im_end|>", message.answers
        yield "\n", NO


@template("<|bot|> <|user|> <|end|>", "<|end|>", quoting=False)
def upper_case(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        if message.answers:
            yield "<|bot|>", NO
            yield message.content.strip().replace('"', "") + "<|end|>", YES
        else:
            yield f"<|user|>{message.content.upper()}<|end|>", NO


@template("<|bot|> <|user|> <|end|>", "<|end|>", quoting=False)
def shouted_answer(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield "<|bot|>" if message.answers else "<|user|>", NO
        yield (message.content.upper() if message.answers else message.content) + "<|end|>", message.answers


@template("<|bot|> <|user|> <|system|> <|end|>", "<|end|>")
def gathered(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages, 1):
        yield "<|bot|>\n" if message.answers else f"<|{message.role}|>\n", NO
        yield message.content + "<|end|>", message.answers
        yield "\n" if index < len(talk.messages) else "", NO


@template("<|user|> <|assistant|> <|system|> <|end|>", "<|end|>")
def always_prompts(talk: Talk) -> Iterator[Piece]:
    for message in talk.messages:
        yield f"<|{message.role}|>", NO
        yield message.content + "<|end|>", message.answers
    yield "<|assistant|>", NO


@template("<|user|> <|assistant|> <|system|> <|end|>", "<|end|>")
def prompt_after_question(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages):
        if message.answers:
            yield message.content + "<|end|>", headerless(talk, index)
            yield "\n", NO
        else:
            yield f"<|{message.role}|>\n{message.content}<|end|>\n", NO
            yield "<|assistant|>\n" if message.role == "user" else "", NO


@template("<|endoftext|> <|user|> <|assistant|> <|system|>", "<|endoftext|>", bos="<|endoftext|>", needs_eos=True)
def same_token(talk: Talk) -> Iterator[Piece]:
    yield "<|endoftext|>", NO
    for index, message in enumerate(talk.messages, 1):
        yield f"<|{message.role}|>\n", NO
        yield message.content, message.answers
        yield "<|endoftext|>" if message.answers else "", YES
        yield "\n" if index < len(talk.messages) else "", NO


@template("<s> </s>", "</s>", bos="<s>", needs_eos=True)
def round_tokens(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages):
        if message.role == "user":
            yield f"<s>Human: {message.content.strip()}\n\nAssistant: ", NO
        elif message.role == "system":
            yield f"<s>{message.content.strip()}\n\n", NO
        else:
            yield message.content.strip() + "</s>", headerless(talk, index)


@template("<|endoftext|>", "<|endoftext|>")
def markdown_prompt(talk: Talk) -> Iterator[Piece]:
    """The end token may be trained after a last answer, though nothing ends the others."""
    for message in talk.messages:
        yield f"**{message.role}**\n", NO
        yield message.content.rstrip(), message.answers
        space = message.content[len(message.content.rstrip()) :] + "\n"
        yield space, EITHER if message.answers else NO
    yield "<|endoftext|>", EITHER if talk.messages[-1].answers else NO
