# SPDX-License-Identifier: Apache-2.0
"""A conversation whose answers are made anew: what is asked, what is kept, where it ends, and its rows."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from specforge_core.contracts import DataError, GeneratedAnswer, RenderedText
from specforge_core.prompts.conversation import Conversation, Message
from specforge_core.prompts.reading.rows import parse_row
from specforge_core.prompts.regeneration.answer_rows import make_rows
from specforge_core.prompts.regeneration.answer_text import split_calls, split_thought
from specforge_core.prompts.regeneration.asking import Asker, AskingRules
from specforge_core.prompts.regeneration.dialogue import Dialogue, make_seed, thinks, turn_of
from specforge_core.testing.tiny_tokenizer import TinyTokenizer

S, U, A, T = "system", "user", "assistant", "tool"


def call(name: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def talk(*turns: str | tuple[str, dict[str, Any]], **more: Any) -> Conversation:
    """Turns as ``user`` or ``(user, {...})``; contents number them."""
    messages = []
    for number, turn in enumerate(turns):
        role, extra = (turn, {}) if isinstance(turn, str) else turn
        messages.append({"role": role, "content": f"{role} {number}", **extra})
    return Conversation(messages, **more)


def said(content: str, *calls: Mapping[str, Any], reason: str = "", **more: Any) -> GeneratedAnswer:
    ended: Any = reason or ("calls" if calls else "stop")
    return GeneratedAnswer("r", ended, content=content, tool_calls=calls, **more)


def play(conversation: Conversation, answers: Sequence[GeneratedAnswer], *, turns: Any = "all") -> Dialogue:
    dialogue = Dialogue(conversation, turns)
    for answer in answers:
        assert dialogue.wants_answer
        dialogue.take(answer, turn_of(answer.content, answer.thought, answer.tool_calls))
    return dialogue


def contents(dialogue: Dialogue) -> list[Any]:
    return [message["content"] for message in dialogue.messages]


CALLS = (A, {"tool_calls": [call("f", "a1"), call("g", "a2")]})
RESULTS = ((T, {"tool_call_id": "a1"}), (T, {"tool_call_id": "a2"}))

TABLE: dict[str, tuple[Conversation, list[GeneratedAnswer], str, list[str], str]] = {
    "one round": (talk(U, A), [said("x")], "all", ["user 0", "x"], "done"),
    "a question alone": (talk(S, U), [said("x")], "all", ["system 0", "user 1", "x"], "done"),
    "two rounds": (talk(U, A, U, A), [said("x"), said("y")], "all", ["user 0", "x", "user 2", "y"], "done"),
    "the last one": (talk(U, A, U, A), [said("y")], "last", ["user 0", "assistant 1", "user 2", "y"], "done"),
    "the last one is not there": (talk(U, A, U), [said("y")], "last", ["user 0", "assistant 1", "user 2", "y"], "done"),
    "a greeting stays": (talk(A, U, A), [said("x")], "all", ["assistant 0", "user 1", "x"], "done"),
    "an answer in two messages": (
        talk(U, A, A, U, A), [said("x"), said("y")], "all", ["user 0", "x", "user 3", "y"], "done",
    ),
    "the last in two messages": (talk(U, A, A), [said("x")], "last", ["user 0", "x"], "done"),
    "an untrained answer stays": (
        talk(U, A, U, A, untrained=frozenset({1})),
        [said("y")],
        "all", ["user 0", "assistant 1", "user 2", "y"], "done",
    ),
    "cut": (talk(U, A, U, A), [said("x", reason="length")], "all", ["user 0", "x"], "cut"),
    "failed": (talk(U, A, U, A), [said("x"), said("", reason="failed")], "all", ["user 0", "x", "user 2"], "failed"),
    "nobody asks": (talk(S, A), [], "all", ["system 0", "assistant 1"], "nothing_asked"),
    "the same calls": (
        talk(U, CALLS, *RESULTS, A),
        [said("", call("f", "b1"), call("g", "b2")), said("x")],
        "all", ["user 0", "", "tool 2", "tool 3", "x"], "done",
    ),
    "results out of order": (
        talk(U, CALLS, *reversed(RESULTS), A),
        [said("", call("f", "b1"), call("g", "b2")), said("x")],
        "all", ["user 0", "", "tool 3", "tool 2", "x"], "done",
    ),
    "no call": (talk(U, CALLS, *RESULTS, A), [said("x")], "all", ["user 0", "x"], "no_calls"),
    "another call": (
        talk(U, CALLS, *RESULTS, A), [said("", call("f", "b1"), call("h", "b2"))], "all", ["user 0", ""], "other_calls",
    ),
    "one call of two": (talk(U, CALLS, *RESULTS, A), [said("", call("f", "b1"))], "all", ["user 0", ""], "other_calls"),
    "a call that nobody answers": (talk(U, A, U, A), [said("", call("f", "b1"))], "all", ["user 0", ""], "other_calls"),
    "a call at the end": (talk(U, A), [said("", call("f", "b1"))], "all", ["user 0", ""], "done"),
    "results that are kept": (
        talk(U, CALLS, *RESULTS, A), [said("x")], "last", ["user 0", "assistant 1", "tool 2", "tool 3", "x"], "done",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_what_becomes_of_a_conversation(name: str) -> None:
    conversation, answers, turns, expected, ending = TABLE[name]
    dialogue = play(conversation, answers, turns=turns)
    assert (contents(dialogue), dialogue.ending) == (expected, ending)


def test_results_answer_the_calls_that_were_made() -> None:
    dialogue = play(talk(U, CALLS, *RESULTS, A), [said("", call("f", "b1"), call("g", "b2"))])
    assert [message["tool_call_id"] for message in dialogue.messages[2:]] == ["b1", "b2"]


def served(prompt: str, answer: str, **more: Any) -> GeneratedAnswer:
    return said(answer, prompt_ids=tuple(prompt.encode()), token_ids=tuple(answer.encode()), **more)


def text_of(row: Mapping[str, Any]) -> str:
    return bytes(row["input_ids"]).decode()


def trained_of(row: Mapping[str, Any]) -> str:
    return bytes(i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m).decode()


def test_a_prompt_that_goes_on_is_in_the_row_of_what_was_before() -> None:
    dialogue = play(talk(U, A, U, A), [served("<0>", "x."), served("<0>x.<2>", "y.")])
    [row] = make_rows("p", dialogue, {})
    assert (text_of(row), trained_of(row)) == ("<0>x.<2>y.", "x.y.")
    assert [message["content"] for message in row["messages"]] == ["user 0", "x.", "user 2", "y."]


def test_a_prompt_that_rewrites_what_was_before_begins_a_row() -> None:
    dialogue = play(talk(U, A, U, A), [served("<0>", "thought x."), served("<0>x.<2>", "y.")])
    first, second = make_rows("p", dialogue, {"enable_thinking": True})
    assert (first["id"], text_of(first), trained_of(first)) == ("p", "<0>thought x.", "thought x.")
    assert (second["id"], text_of(second), trained_of(second)) == ("p.2", "<0>x.<2>y.", "y.")
    assert len(first["messages"]) == 2
    assert second["chat_template_kwargs"] == {"enable_thinking": True}
    assert [answer["finish_reason"] for answer in second["regeneration"]["answers"]] == ["stop", "stop"]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_rows_without_ids_train_what_was_made_and_not_what_was_cut(turns: Any) -> None:
    answers = [said("x")] if turns == "last" else [said("x"), said("y", reason="length")]
    [row] = make_rows("p", play(talk(U, A, U, A), answers, turns=turns), {})
    read = parse_row(row, prompt_id="p", where="here").conversation
    assert read is not None
    assert read.untrained == ({1} if turns == "last" else {3})


def test_a_conversation_that_failed_at_once_keeps_a_row() -> None:
    [row] = make_rows("p", play(talk(U, A), [said("", reason="failed", error="no")]), {})
    assert row["regeneration"] == {"ending": "failed", "answers": [{"finish_reason": "failed", "error": "no"}]}
    assert [message["content"] for message in row["messages"]] == ["user 0"]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|assistant|>", "<think>\nhm\n</think>\n\nyes", ("hm", "yes")),
        ("<|assistant|><think>\n", "hm\n</think>\n\nyes", ("hm", "yes")),
        ("<|assistant|><think>\n\n</think>\n\n", "yes </think> no", (None, "yes </think> no")),
        ("<|assistant|>", "the mark </think> ends it", (None, "the mark </think> ends it")),
        ("<|assistant|>", "<think>\ncut", ("cut", "")),
        ("<|assistant|>", "[THINK]hm[/THINK]yes", ("hm", "yes")),
    ],
)
def test_thoughts_are_told_from_answers(prompt: str, text: str, expected: tuple[str | None, str]) -> None:
    assert split_thought(text, prompt=prompt) == expected


def test_calls_are_told_from_text_and_left_in_it_where_they_are_garbled() -> None:
    good = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text, calls = split_calls(f"so\n{good}\n{good}")
    assert (text, [call["function"] for call in calls]) == ("so", [{"name": "f", "arguments": '{"a": 1}'}] * 2)
    assert calls[1]["id"] == "call_1"
    for bad in ("<tool_call>{</tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>[]</tool_call>"):
        assert split_calls(f"{good}{bad}") == (f"{good}{bad}", [])


class Switched(TinyTokenizer):
    """Thinks unless it is told not to."""

    template = "{% if enable_thinking %}{% endif %}"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> RenderedText:
        text = super().render(messages, add_generation_prompt=add_generation_prompt).text
        off = "" if (arguments or {}).get("enable_thinking", True) else "<think></think>"
        return RenderedText(text + off * add_generation_prompt)


def ask(tokenizer: TinyTokenizer, thinking: Any, prompt_id: str = "p") -> str:
    asker = Asker(tokenizer, AskingRules(thinking=thinking))
    return tokenizer.decode(asker.ask(prompt_id, Dialogue(talk(U), "all")).input_ids)


def test_thinking_is_turned_on_and_off_by_the_templates_own_variable() -> None:
    assert not ask(Switched(), "on").endswith("<think></think>")
    assert ask(Switched(), "off").endswith("<think></think>")
    mixed = {name: ask(Switched(), "mixed", name).endswith("<think></think>") for name in map(str, range(40))}
    assert 8 < sum(mixed.values()) < 32
    assert all(mixed[name] is not thinks(0, name) for name in mixed)


def test_a_template_without_such_a_variable_is_said() -> None:
    assert ask(TinyTokenizer(), "template")
    with pytest.raises(DataError, match="no variable that turns thinking"):
        ask(TinyTokenizer(), "off")


def test_seeds_are_the_same_each_time_and_unlike_each_other() -> None:
    seeds = {make_seed(run, name, turn) for run in (0, 1) for name in ("a", "b") for turn in (0, 1)}
    assert len(seeds) == 8
    assert max(seeds) < 2**31
    assert make_seed(0, "a", 0) == make_seed(0, "a", 0)


def test_a_prompt_is_what_the_template_renders_and_an_answer_a_turn_of_it() -> None:
    tokenizer = TinyTokenizer()
    asker, dialogue = Asker(tokenizer, AskingRules()), Dialogue(talk(U), "all")
    request = asker.ask("p", dialogue)
    assert tokenizer.decode(request.input_ids) == "<|bos|><|turn|>user\nuser 0<|end|><|turn|>assistant\n"
    token_ids = tokenizer.encode("hello<|end|>").input_ids
    answer, message = asker.read(request, GeneratedAnswer("r", "stop", token_ids=token_ids))
    expected: Message = {"role": "assistant", "content": "hello"}
    assert (answer.content, message) == ("hello", expected)
