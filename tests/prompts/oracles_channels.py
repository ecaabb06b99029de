# SPDX-License-Identifier: Apache-2.0
"""Oracles of templates with channels or actions, and of those that tell the names of results or come in two."""

from __future__ import annotations

from collections.abc import Iterator

from talk import NO, YES, Message, Piece, Refused, Talk, dumps, neighbours, template


@template("<|start_of_role|> <|end_of_role|> <|tool_call|> <|end_of_text|>", "<|end_of_text|>", tools=True)
def tools_listed(talk: Talk) -> Iterator[Piece]:
    for index, message in enumerate(talk.messages):
        name = f" {message.name}" if message.role == "tool" else ""
        yield f"<|start_of_role|>{message.role}{name}<|end_of_role|>", NO
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        yield message.content + (f"<|tool_call|>{dumps(calls)}" if calls else "") + "<|end_of_text|>", message.answers
        yield "\n", NO
        if index == 0 and talk.tools:
            told = dumps(list(talk.tools), indent=2)
            yield f"<|start_of_role|>available_tools<|end_of_role|>{told}<|end_of_text|>\n", NO


@template(
    "<|start|> <|channel|> <|message|> <|call|> <|end|> <|return|>",
    "<|return|> <|call|>",
    tools=True,
    thoughts=True,
    most_calls=1,
    none=True,
    developer=True,
    arguments=({}, {"reasoning_effort": "high"}),
)
def harmony(talk: Talk) -> Iterator[Piece]:
    """The prompt ends after the name of the role, so all that follows is the model's, other messages of it included."""
    first = talk.messages[0]
    rules = first.content if first.role in ("system", "developer") else ""
    turns = talk.messages[1:] if first.role in ("system", "developer") else talk.messages
    effort = talk.arguments.get("reasoning_effort", "medium")
    yield f"<|start|>system<|message|>Date: 2024-02-29\nReasoning: {effort}<|end|>", NO
    if rules or talk.tools:
        yield "<|start|>developer<|message|>", NO
        yield f"# Instructions\n\n{rules}\n\n" if rules else "", NO
        yield _namespace(talk) if talk.tools else "", NO
        yield "<|end|>", NO
    called = ""
    for index, turn in enumerate(turns, 1):
        if turn.answers:
            called = turn.calls[0].name if turn.calls else called
            answered = any(later.answers and not later.calls for later in turns[index:])
            yield "<|start|>assistant", NO
            yield _messages(turn, answered=answered, last=index == len(turns)), YES
        elif turn.role == "tool":
            content = dumps(turn.content)
            yield f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>{content}<|end|>", NO
        else:
            yield f"<|start|>{turn.role}<|message|>{turn.content}<|end|>", NO


def _messages(turn: Message, *, answered: bool, last: bool) -> str:
    """All that the model writes in one turn."""
    if len(turn.calls) > 1:
        raise Refused("two calls")
    thought = turn.thought or (turn.content if turn.calls else "")
    text = "" if answered or not thought else f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
    if turn.calls:
        [call] = turn.calls
        return f"{text} to=functions.{call.name}<|channel|>commentary json<|message|>{call.json}<|call|>"
    return f"{text}<|channel|>final<|message|>{turn.content}{'<|return|>' if last else '<|end|>'}"


def _namespace(talk: Talk) -> str:
    text = "# Tools\n\nnamespace functions {\n\n"
    for tool in talk.tools:
        function = tool["function"]
        needed = function["parameters"].get("required", [])
        text += f"// {function['description']}\ntype {function['name']} = (_: {{\n"
        for name, about in function["parameters"]["properties"].items():
            text += f"{name}{'' if name in needed else '?'}: {about['type']},\n"
        text += "}) => any;\n\n"
    return text + "} // namespace functions"


@template(
    "<bos> <|TURN|> <|USER|> <|SYSTEM|> <|ASSISTANT|> <|TOOL|> <|/TURN|>",
    "<|/TURN|>",
    bos="<bos>",
    tools=True,
    files={"default": "named_default", "tool_use": "named_tool_use"},
)
def named_templates(talk: Talk) -> Iterator[Piece]:
    yield "<bos>", NO
    if talk.tools:
        yield f"<|TURN|><|SYSTEM|>Tools: {dumps(list(talk.tools))}<|/TURN|>", NO
    for message in talk.messages:
        yield f"<|TURN|><|{message.role.upper()}|>", NO
        calls = ",\n".join(
            f'{{"tool_name": "{call.name}", "parameters": {dumps(call.arguments, indent=4)}}}' for call in message.calls
        )
        action = f"Action: ```json\n[{calls}]```" if calls else ""
        yield f"{message.content}{action}<|/TURN|>", message.answers


_COHERE = "<bos> <|TURN|> <|CHATBOT|> <|USER|> <|SYSTEM|> <|THINK|> <|/THINK|> <|ACTION|> <|/ACTION|> <|RESULT|>"


@template(
    _COHERE + " <|/RESULT|> <|RESPONSE|> <|/RESPONSE|> <|/TURN|>",
    stops="<|/TURN|>",
    bos="<bos>",
    tools=True,
    thoughts=True,
    none=True,
)
def tools_as_action(talk: Talk) -> Iterator[Piece]:
    yield "<bos>", NO
    number = result = 0
    for before, message, after in neighbours(talk.messages):
        if message.calls:
            made = []
            for call in message.calls:
                made.append(
                    f'    {{"tool_call_id": "{number}", "tool_name": "{call.name}", "parameters": {call.json}}}'
                )
                number += 1
            yield "<|TURN|><|CHATBOT|>", NO
            plan = message.thought or message.content
            yield "<|THINK|>" + (plan or "I will call.") + "<|/THINK|>", YES
            yield "<|ACTION|>[\n" + ",\n".join(made) + "\n]<|/ACTION|><|/TURN|>", YES
        elif message.answers:
            yield "<|TURN|><|CHATBOT|>", NO
            yield f"<|RESPONSE|>{message.content}<|/RESPONSE|><|/TURN|>", YES
        elif message.role == "tool":
            yield "," if before == "tool" else "<|TURN|><|SYSTEM|><|RESULT|>[", NO
            yield f'{{"tool_call_id": "{result}", "results": {dumps(message.content)}}}', NO
            yield "" if after == "tool" else "]<|/RESULT|><|/TURN|>", NO
            result += 1
        else:
            yield f"<|TURN|><|{message.role.upper()}|>{message.content}<|/TURN|>", NO
