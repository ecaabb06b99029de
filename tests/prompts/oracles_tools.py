# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates that render tools, calls and results, most of them with special tokens of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from talk import (
    EITHER,
    NO,
    YES,
    Call,
    Message,
    Piece,
    Refused,
    Talk,
    dumps,
    headerless,
    hoisted,
    neighbours,
    refuse_unless_in_turn,
    template,
)


def _last_question(messages: Sequence[Message]) -> int:
    return max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)


@template("<|im_start|> <|im_end|>", "<|im_end|>", tools=True)
def tools_in_system(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    yield "<|im_start|>system\n" + (system if talk.messages[0].role == "system" else "You help."), NO
    if talk.tools:
        yield "\n\nTools:\n<tools>" + "".join("\n" + dumps(tool) for tool in talk.tools) + "\n</tools>", NO
    yield "<|im_end|>\n", NO
    for before, turn, after in neighbours(turns):
        if turn.role == "tool":
            yield "" if before == "tool" else "<|im_start|>user", NO
            yield f"\n<tool_response>\n{turn.content}\n</tool_response>", NO
            yield "" if after == "tool" else "<|im_end|>\n", NO
        elif turn.calls:
            parts = [turn.content] if turn.content else []
            for call in turn.calls:
                parts.append(f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.json}}}\n</tool_call>')
            yield "<|im_start|>assistant\n", NO
            yield "\n".join(parts) + "<|im_end|>", YES
            yield "\n", NO
        else:
            yield f"<|im_start|>{turn.role}\n", NO
            yield turn.content + "<|im_end|>", turn.answers
            yield "\n", NO


@template("<|im_start|> <|im_end|>", "<|im_end|>", tools=True, thoughts=True, none=True)
def tools_and_thoughts(talk: Talk) -> Iterator[Piece]:
    asked = _last_question(talk.messages)
    if talk.tools:
        yield f"<|im_start|>system\n{dumps(list(talk.tools))}<|im_end|>\n", NO
    for index, message in enumerate(talk.messages):
        yield f"<|im_start|>{message.role}\n", NO
        if message.answers and message.thought and index > asked:
            yield f"<think>\n{message.thought.strip()}\n</think>\n\n", YES
        calls = [f'<tool_call>\n{{"name": "{c.name}", "arguments": {c.json}}}\n</tool_call>' for c in message.calls]
        yield "\n".join([*([message.content] if message.content else []), *calls]) + "<|im_end|>", message.answers
        yield "\n", NO


_MISTRAL = "<s> </s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS]"


@template(_MISTRAL, "</s>", bos="<s>", tools=True, order="turns", needs_eos=True)
def tools_before_last_question(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    refuse_unless_in_turn([turn for turn in turns if turn.role == "user" or (turn.answers and not turn.calls)])
    if any(len(call.call_id) != 9 for turn in turns for call in turn.calls):
        raise Refused("an id")
    last = _last_question(talk.messages)
    yield "<s>", NO
    for index, turn in enumerate(talk.messages):
        if turn.role == "user":
            if index == last and talk.tools:
                yield f"[AVAILABLE_TOOLS] {dumps(list(talk.tools))}[/AVAILABLE_TOOLS]", NO
            lead = system + "\n\n" if index == last and talk.messages[0].role == "system" else ""
            yield f"[INST] {lead}{turn.content}[/INST]", NO
        elif turn.calls:
            made = [{"name": c.name, "arguments": c.arguments, "id": c.call_id} for c in turn.calls]
            yield f"[TOOL_CALLS] {dumps(made)}</s>", YES
        elif turn.answers:
            yield " ", EITHER
            yield turn.content.strip() + "</s>", headerless(talk, index)
        elif turn.role == "tool":
            yield f'[TOOL_RESULTS] {{"content": {turn.content}, "call_id": "{turn.call_id}"}}[/TOOL_RESULTS]', NO


@template(
    _MISTRAL + " [ARGS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    "</s>",
    bos="<s>",
    tools=True,
    none=True,
    needs_eos=True,
)
def tools_named_args(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    if talk.tools:
        yield f"[AVAILABLE_TOOLS]{dumps(list(talk.tools))}[/AVAILABLE_TOOLS]", NO
    names = {"system": "SYSTEM_PROMPT", "user": "INST", "tool": "TOOL_RESULTS"}
    for index, turn in enumerate(talk.messages):
        if turn.answers:
            calls = "".join(f"[TOOL_CALLS]{call.name}[ARGS]{call.json}" for call in turn.calls)
            yield f"{turn.content}{calls}</s>", headerless(talk, index)
        else:
            yield f"[{names[turn.role]}]{turn.content}[/{names[turn.role]}]", NO


@template("<s> <|head|> <|/head|> <|eom|> <|eot|>", "<|eot|> <|eom|>", bos="<s>", tools=True, most_calls=1)
def tools_one_call(talk: Talk) -> Iterator[Piece]:
    system, turns = hoisted(talk.messages)
    told = False
    yield f"<s><|head|>system<|/head|>\n\nDate: 29 Feb 2024\n\n{system.strip()}<|eot|>", NO
    for turn in turns:
        yield f"<|head|>{'ipython' if turn.role == 'tool' else turn.role}<|/head|>\n\n", NO
        if turn.role == "user" and talk.tools and not told:
            told = True
            yield "Functions you may call:\n\n" + "".join(dumps(t, indent=4) + "\n\n" for t in talk.tools), NO
        if turn.calls:
            if len(turn.calls) > 1:
                raise Refused("two calls")
            yield f'{{"name": "{turn.calls[0].name}", "parameters": {turn.calls[0].json}}}<|eom|>', YES
        else:
            text = dumps(turn.content) if turn.role == "tool" else turn.content.strip()
            yield text + "<|eot|>", turn.answers


@template(
    "<s> <|im_start|> <|tool_call_start|> <|tool_call_end|> <|tool_response_start|> <|tool_response_end|> <|im_end|>",
    stops="<|im_end|>",
    bos="<s>",
    tools=True,
)
def tools_as_python(talk: Talk) -> Iterator[Piece]:
    yield "<s>", NO
    if talk.tools:
        yield f"<|im_start|>system\nTools: {', '.join(t['function']['name'] for t in talk.tools)}<|im_end|>\n", NO
    for message in talk.messages:
        yield f"<|im_start|>{message.role}\n", NO
        text = message.content
        if message.role == "tool":
            text = f"<|tool_response_start|>{text}<|tool_response_end|>"
        if message.calls:
            text += f"<|tool_call_start|>[{', '.join(_python(call) for call in message.calls)}]<|tool_call_end|>"
        yield text + "<|im_end|>", message.answers
        yield "\n", NO


def _python(call: Call) -> str:
    given = (f'{name}="{v}"' if isinstance(v, str) else f"{name}={v}" for name, v in call.arguments.items())
    return f"{call.name}({', '.join(given)})"


@template(
    "<bos> <|User|> <|Assistant|> <|calls_begin|> <|calls_end|> <|call_begin|> <|call_end|> <|tool_sep|>"
    " <|outputs_begin|> <|outputs_end|> <|output_begin|> <|output_end|> <eos>",
    stops="<eos>",
    bos="<bos>",
    tools=True,
    calls_as="text",
    none=True,
    needs_eos=True,
)
def tools_fenced(talk: Talk) -> Iterator[Piece]:
    yield "<bos>" + "".join(message.content for message in talk.messages if message.role == "system"), NO
    for index, (before, message, after) in enumerate(neighbours(talk.messages)):
        if message.role == "user":
            yield "<|User|>" + message.content, NO
        elif message.role == "tool":
            yield "\n" if before == "tool" else "<|outputs_begin|>", NO
            yield f"<|output_begin|>{message.content}<|output_end|>", NO
            yield "" if after == "tool" else "<|outputs_end|>", NO
        elif message.answers:
            yield "" if before == "tool" else "<|Assistant|>", NO
            calls = "\n".join(
                f"<|call_begin|>function<|tool_sep|>{call.name}\n```json\n{call.json}\n```<|call_end|>"
                for call in message.calls
            )
            section = f"<|calls_begin|>{calls}<|calls_end|>" if calls else ""
            yield message.content + section + "<eos>", headerless(talk, index) if before == "tool" else YES


@template(
    "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|section_begin|> <|section_end|> <|call_begin|>"
    " <|argument_begin|> <|call_end|> <|im_end|>",
    stops="<|im_end|>",
    tools=True,
    none=True,
)
def tools_by_id(talk: Talk) -> Iterator[Piece]:
    if talk.tools:
        told = dumps(list(talk.tools), separators=(",", ":"))
        yield f"<|im_system|>tool_declare<|im_middle|>{told}<|im_end|>", NO
    for message in talk.messages:
        if message.role == "tool":
            yield f"<|im_system|>{message.name}<|im_middle|>## Return of {message.call_id}\n{message.content}", NO
            yield "<|im_end|>", NO
            continue
        yield f"<|im_{message.role}|>{message.role}<|im_middle|>", NO
        calls = "".join(
            f"<|call_begin|>functions.{call.name}:{call.call_id}<|argument_begin|>{call.json}<|call_end|>"
            for call in message.calls
        )
        section = f"<|section_begin|>{calls}<|section_end|>" if calls else ""
        yield message.content + section + "<|im_end|>", message.answers


@template(
    "[gMASK] <sop> <|user|> <|assistant|> <|system|> <|observation|> <|endoftext|>",
    "<|endoftext|> <|user|> <|observation|>",
    tools=True,
    thoughts=True,
    none=True,
)
def tools_keys_and_values(talk: Talk) -> Iterator[Piece]:
    yield "[gMASK]<sop>", NO
    if talk.tools:
        yield "<|system|>\n# Tools\n" + "".join(dumps(tool) + "\n" for tool in talk.tools), NO
    asked, before = _last_question(talk.messages), ""
    for index, message in enumerate(talk.messages):
        opens = "observation" if message.role == "tool" else message.role
        if message.role != "tool" or before != "tool":
            yield f"<|{opens}|>", before == "assistant"
        before = message.role
        if message.role == "tool":
            yield f"\n<tool_response>\n{message.content}\n</tool_response>", NO
        elif not message.answers:
            yield f"\n{message.content}", NO
        else:
            yield from _keys_and_values(message, message.thought.strip() if index > asked else "")


def _keys_and_values(message: Message, thought: str) -> Iterator[Piece]:
    if thought:
        yield f"\n<think>{thought}</think>", YES
    else:
        yield "\n", EITHER
        yield "<think></think>", NO
    beyond: bool | None = YES if thought else EITHER  # the newline after an empty block
    if message.content.strip():
        yield "\n", beyond
        yield message.content.strip(), YES
        beyond = YES
    for call in message.calls:
        yield "\n", beyond
        yield f"<tool_call>{call.name}\n", YES
        for name, given in call.arguments.items():
            value = given if isinstance(given, str) else dumps(given)
            yield f"<arg_key>{name}</arg_key>\n<arg_value>{value}</arg_value>\n", YES
        yield "</tool_call>", YES
        beyond = YES


@template("<|im_start|> <|im_end|>", "<|im_end|>", tools=True)
def tools_as_xml(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages):
        if message.role == "tool":
            yield f"<|im_start|>user\n<tool_response>\n{message.content}\n</tool_response><|im_end|>\n", NO
        elif message.answers:
            parts = [message.content.strip()] if message.content or not message.calls else []
            for call in message.calls:
                given = "".join(
                    f"<parameter={name}>\n{value if isinstance(value, str) else dumps(value)}\n</parameter>\n"
                    for name, value in call.arguments.items()
                )
                parts.append(f"<tool_call>\n<function={call.name}>\n{given}</function>\n</tool_call>")
            yield "<|im_start|>assistant\n", NO
            yield "\n".join(parts) + "<|im_end|>", YES
            yield "\n", NO
        else:
            told = dumps([tool["function"] for tool in talk.tools])
            extra = f"\n\n# Tools\n{told}" if index == 0 and message.role == "system" and talk.tools else ""
            yield f"<|im_start|>{message.role}\n{message.content}{extra}<|im_end|>\n", NO
