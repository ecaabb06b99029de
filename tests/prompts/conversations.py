# SPDX-License-Identifier: Apache-2.0
"""Conversations for the templates of these tests: fixed ones, each with what it is there for, and random ones.

Every text of system, user and tool holds a secret of its own, a word that no answer holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from random import Random

from talk import Call, Message, Talk, Template

WORDS = ["one", "two", "three", "four", "five", "Ja", "Nein", "x=1", "{a}", "[b]", "it's", '"so"', "\\n", "###"]
WORDS += ["你好", "😀", "ñandú", "naïve"]
SPACE = ("", "", "", " ", "\n", "  \n", "\t", "\n\n")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city. Said in Zürich's way.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    },
]
_SECRET = re.compile("Q[0-9]{4,}Q")


def secrets(talk: Talk) -> list[str]:
    """The secrets of system, user and tools in a conversation."""
    return [word for m in talk.messages if not m.answers for word in _SECRET.findall(m.content)]


def ask(number: int, text: str = "") -> Message:
    return Message("user", text or f"What is Q{1000 + number}Q?")


def answer(text: str, thought: str = "") -> Message:
    return Message("assistant", text, thought)


def fixed(template: Template) -> Iterator[tuple[str, Talk]]:
    """Conversations that every template is asked for, by name, and those for what this one can."""
    for name, messages in PLAIN.items():
        yield name, Talk(messages)
    for name, messages in QUOTING.items() if template.quoting else ():
        yield name, Talk([replace(m, content=_quoted(m.content, template)) for m in messages])
    yield "contents as parts", Talk(PLAIN["two rounds"], form="parts")
    if template.system:
        system = Message("system", "Be brief, Q7777Q.")
        yield "system", Talk([system, ask(1), answer("It is one.")])
        yield "system, two rounds", Talk([system, ask(1), answer("It is one."), ask(2), answer("It is two.")])
    if template.thoughts:
        for name, messages in THOUGHTS.items():
            yield name, Talk(messages)
    if template.thoughts_in_content:
        for name, messages in WRITTEN_THOUGHTS.items():
            yield name, Talk(messages)
    if template.tools:
        for name, messages in CALLS.items():
            yield name, Talk(messages, TOOLS)
            if template.none:
                yield f"{name}, null contents", Talk(messages, TOOLS, none=True)
        yield (
            "arguments as text",
            Talk(CALLS["two calls" if template.most_calls > 1 else "a call"], TOOLS, calls_as="text"),
        )
        yield "tools, but no call", Talk(PLAIN["one round"], TOOLS)
    for number, arguments in enumerate(template.arguments):
        if arguments:
            yield f"template arguments {number}", Talk(PLAIN["two rounds"], arguments=arguments)
        if arguments and template.thoughts:
            yield f"thought, template arguments {number}", Talk(THOUGHTS["thoughts"], arguments=arguments)


PLAIN = {
    "one round": [ask(1), answer("It is one.")],
    "two rounds": [ask(1), answer("It is one."), ask(2), answer("It is two.")],
    "three rounds, the same answer": [m for n in range(3) for m in (ask(n), answer("Yes."))],
    "ends with a question": [ask(1), answer("It is one."), ask(2)],
    "space at the ends": [ask(1, "\n What is Q1001Q?  "), answer("It is one.\n\n"), ask(2), answer("\n  It is two. ")],
    "an empty answer": [ask(1), answer(""), ask(2), answer("It is two.")],
    "an empty last answer": [ask(1), answer("It is one."), ask(2), answer("")],
    "an answer repeats the question": [ask(1, "Yes."), answer("Yes."), ask(2, "Yes. Q1002Q"), answer("Yes.")],
    "a question recurs trimmed": [ask(1, "Hi "), answer("Hello."), ask(2, "Say Hi to Q1002Q"), answer("Hi Bob.")],
    "beyond the alphabet": [ask(1, "¿Qué es 😀 Q1001Q?"), answer("世界 🌍 été"), ask(2), answer("ß")],
    "the assistant first": [answer("Welcome."), ask(1), answer("It is one.")],
    "two answers in a row": [ask(1), answer("It is one."), answer("Or two."), ask(3), answer("Three.")],
    "two questions in a row": [ask(1), ask(2), answer("It is two.")],
    "one letter": [ask(1, "a"), answer("b"), ask(2, "b"), answer("a")],
    "digits and roles": [ask(1, "assistant Q1001Q"), answer("user"), ask(2, "system"), answer("assistant")],
}
QUOTING = {
    "a question quotes an answer": [ask(1, "Say @ It is one. @ Q1001Q"), answer("It is one."), ask(2), answer("Two.")],
    "an answer quotes what ends it": [ask(1), answer("It ends with @ so."), ask(2), answer("Two @")],
    "an answer is only a quote": [ask(1), answer("@"), ask(2), answer("It is two.")],
}
THOUGHTS = {
    "a thought": [ask(1), answer("It is one.", "Let me think.")],
    "thoughts": [ask(1), answer("It is one.", "First thought."), ask(2), answer("It is two.", "Second thought.")],
    "a thought, then none": [ask(1), answer("It is one.", "First thought."), ask(2), answer("It is two.")],
    "a thought that says the answer": [ask(1), answer("one", "So one, surely one."), ask(2), answer("2", "so 2")],
    "a thought with space around": [ask(1), answer("It is one.", "Let me think.  \n")],
    "a thought and no answer": [ask(1), answer("", "Let me think."), ask(2), answer("It is two.")],
    "a thought, then a question": [ask(1), answer("It is one.", "First thought."), ask(2)],
}
WRITTEN_THOUGHTS = {
    "a thought in the content": [ask(1), answer("<think>\nLet me think.\n</think>\n\nIt is one.")],
    "thoughts in the content": [
        *(ask(1), answer("<think>\nFirst thought.\n</think>\n\nIt is one.")),
        *(ask(2), answer("<think>\nSecond thought.\n</think>\n\nIt is two.")),
    ],
}
_oslo = Call("get_weather", {"city": "Oslo"}, "call00001")
_sum = Call("add", {"a": 1, "b": 2.5}, "call00002")
_told = Message("tool", "3 degrees Q2001Q", name="get_weather", call_id="call00001")
_summed = Message("tool", "3.5 Q2002Q", name="add", call_id="call00002")
CALLS = {
    "a call": [ask(1), Message("assistant", calls=[_oslo]), _told, answer("Three degrees.")],
    "a call with words": [ask(1), Message("assistant", "I look.", calls=[_oslo]), _told, answer("Three degrees.")],
    "two calls": [ask(1), Message("assistant", calls=[_oslo, _sum]), _told, _summed, answer("Both.")],
    "call after call": [
        *(ask(1), Message("assistant", calls=[_oslo]), _told, Message("assistant", calls=[_sum]), _summed),
        *(answer("Both."), ask(2), answer("It is two.")),
    ],
    "a call with a short id": [ask(1), Message("assistant", calls=[replace(_oslo, call_id="c1")])],
    "a call is the last": [ask(1), Message("assistant", "I look.", calls=[_oslo])],
    "a call with a thought": [
        *(ask(1), Message("assistant", "", "I must look.", calls=[_oslo]), _told),
        answer("Three degrees.", "It is cold."),
    ],
    "rounds with calls": [
        *(ask(1), Message("assistant", "", "I must look.", calls=[_oslo]), _told, answer("Three degrees.", "Cold.")),
        *(ask(2), Message("assistant", "", "Now add.", calls=[_sum]), _summed, answer("It is 3.5.", "Easy.")),
    ],
}


def random_talk(template: Template, chance: Random) -> Talk:
    """A conversation such as the template is made for, now and then one that it refuses."""
    messages: list[Message] = []
    if template.system and chance.random() < 0.4:
        role = "developer" if template.developer and chance.random() < 0.5 else "system"
        messages.append(Message(role, _text(template, chance, secret=True)))
    if template.order == "any" and chance.random() < 0.1:
        messages.append(_answer(template, chance))
    for _ in range(chance.choice((1, 1, 2, 2, 3, 4))):
        messages.append(Message("user", _text(template, chance, secret=True)))
        if (template.order == "any" and chance.random() < 0.1) or chance.random() < 0.01:
            messages.append(Message("user", _text(template, chance, secret=True)))
        if template.tools and chance.random() < 0.4:
            for _ in range(chance.choice((1, 1, 2))):
                messages += _calls(template, chance)
        messages.append(_answer(template, chance))
        if (template.order == "any" and chance.random() < 0.1) or chance.random() < 0.01:
            messages.append(_answer(template, chance))
    if chance.random() < 0.15:
        messages.append(Message("user", _text(template, chance, secret=True)))
    called = any(message.calls for message in messages)
    return Talk(
        messages,
        tools=chance.choice((TOOLS, TOOLS[:1])) if called or (template.tools and chance.random() < 0.3) else (),
        arguments=chance.choice(list(template.arguments)),
        form=chance.choice(("text", "text", "parts")),
        calls_as=chance.choice(("object", "object", "text")),
        none=template.none and chance.random() < 0.3,
    )


def _answer(template: Template, chance: Random) -> Message:
    thought = _words(chance, 6) if template.thoughts and chance.random() < 0.5 else ""
    text = "" if chance.random() < 0.05 else _text(template, chance, secret=False)
    if template.thoughts_in_content and not thought and chance.random() < 0.15:
        text = f"<think>\n{_words(chance, 6)}\n</think>\n\n{text.strip() or 'Yes.'}"
    return Message("assistant", text, thought)


def _calls(template: Template, chance: Random) -> Iterator[Message]:
    calls = []
    for _ in range(chance.randint(1, template.most_calls)):
        call_id = f"{chance.randrange(10**9):09d}"
        if chance.random() < 0.5:
            city = _words(chance, 3)
            arguments = {"city": city} if chance.random() < 0.5 else {"city": city, "days": chance.randrange(9)}
            calls.append(Call("get_weather", arguments, call_id))
        else:
            calls.append(Call("add", {"a": chance.randrange(100), "b": chance.choice((0.5, -1, 7))}, call_id))
    words = _text(template, chance, secret=False) if chance.random() < 0.3 else ""
    thought = _words(chance, 6) if template.thoughts and chance.random() < 0.5 else ""
    yield Message("assistant", words, thought, calls=calls)
    for call in calls:
        yield Message("tool", _text(template, chance, secret=True), name=call.name, call_id=call.call_id)


def _words(chance: Random, most: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, most)))


def _text(template: Template, chance: Random, *, secret: bool) -> str:
    words = [chance.choice(WORDS) for _ in range(chance.randint(1, 8))]
    if template.quoting and chance.random() < 0.2:
        words.insert(chance.randrange(len(words) + 1), _quoted("@", template, chance.choice(("assistant\n", "", " "))))
    if secret:
        words.insert(chance.randrange(len(words) + 1), f"Q{chance.randrange(1000, 10**7)}Q")
    return chance.choice(SPACE) + " ".join(words) + chance.choice(SPACE)


def _quoted(text: str, template: Template, between: str = "assistant\n") -> str:
    """``@`` replaced by what the template's turns begin and end with."""
    first, last = template.special[0], template.special[-1]
    ends = template.stops[0] if template.stops else last
    return text.replace("@", first + between + ends)
