# SPDX-License-Identifier: Apache-2.0
"""Rows in every shape that people have them in: what is made of each, what is left over, and what is refused where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import SourceRow
from specforge_core.prompts.reading.rows import parse_row

ASK, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
TALK = [ASK, ANSWER]
SYSTEM = {"role": "system", "content": "Be brief."}
FUNCTION = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}


def read(content: Mapping[str, Any], mapping: Mapping[str, str] | None = None) -> SourceRow:
    return parse_row(content, prompt_id="p", where="x.jsonl:7", mapping=mapping or {})


def messages(content: Mapping[str, Any], mapping: Mapping[str, str] | None = None) -> list[Any]:
    row = read(content, mapping)
    assert row.conversation is not None
    return [dict(message) for message in row.conversation.messages]


SHAPES: dict[str, Mapping[str, Any]] = {
    "messages": {"messages": TALK},
    "messages as JSON text": {"messages": json.dumps(TALK)},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    "capitals and other words": {
        "conversation": [{"role": "Prompter", "content": "Hi"}, {"role": "BOT", "value": "Hello."}]
    },
    "prompt and completion": {"prompt": "Hi", "completion": "Hello."},
    "prompt and completion in turns": {"prompt": [ASK], "completion": [ANSWER]},
    "turns and a text": {"prompt": [ASK], "completion": "Hello."},
    "a text and a turn": {"prompt": "Hi", "completion": ANSWER},
    "prompt and chosen": {"prompt": [ASK], "chosen": [ANSWER]},
    "chosen repeats the prompt": {"prompt": "Hi", "chosen": TALK},
    "chosen alone": {"chosen": TALK},
    "instruction": {"instruction": "Hi", "input": "", "output": "Hello."},
    "instruction and response": {"instruction": "Hi", "context": None, "response": "Hello."},
    "question": {"question": "Hi", "answer": "Hello."},
    "query": {"query": "Hi", "response": "Hello."},
    "input and output": {"input": "Hi", "output": "Hello."},
    "log": {"messages": [ASK], "choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}]},
    "log of call and response": {"request": {"messages": [ASK]}, "response": {"choices": [{"message": ANSWER}]}},
    "log as JSON text": {"request": json.dumps({"messages": [ASK]}), "choices": json.dumps([{"message": ANSWER}])},
    "batch and result": {
        **{"custom_id": "1", "url": "/v1/chat/completions", "body": {"messages": [ASK]}},
        "response": {"status_code": 200, "body": {"choices": [{"message": {**ANSWER, "refusal": None}}]}},
    },
    "a response that is a message": {"messages": [ASK], "response": ANSWER},
    "a response that is text": {"messages": [ASK], "response": "Hello."},
    "an answer of its own": {"messages": [ASK], "completion": [ANSWER]},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_each_shape_gives_the_conversation(shape: str) -> None:
    assert messages(SHAPES[shape]) == TALK


def test_a_system_column_goes_first_unless_there_is_one() -> None:
    for key in ("system", "system_prompt"):
        assert messages({key: "Be brief.", "messages": TALK}) == [SYSTEM, *TALK]
    assert messages({"system": "", "question": "Hi", "answer": "Hello."}) == TALK
    assert (
        messages({"request": {"system": "Be brief.", "messages": [ASK]}, "choices": [{"message": ANSWER}]})[0] == SYSTEM
    )
    row = read({"system": "Other.", "messages": [SYSTEM, *TALK]})
    assert row.conversation.messages[0] == SYSTEM
    assert row.unused == {"system"}


def test_an_instruction_has_its_input_below_and_its_history_before() -> None:
    row = {"instruction": "Sum.", "input": "1 2", "output": "3", "history": [["Hi", "Hello."]]}
    assert [m["content"] for m in messages(row)] == ["Hi", "Hello.", "Sum.\n\n1 2", "3"]
    thought = messages({"question": "Hi", "answer": "Hello.", "reasoning": "Greet."})
    assert thought[-1] == {**ANSWER, "reasoning": "Greet."}


def test_calls_and_their_results() -> None:
    share = [{"from": "human", "value": "Oslo?"}, {"from": "function_call", "value": {"name": "get_weather"}}]
    share += [{"from": "observation", "value": "3"}, {"from": "gpt", "value": "Three."}]
    assert [(m["role"], m["content"]) for m in messages({"conversations": share})] == [
        ("user", "Oslo?"),
        ("assistant", '{"name": "get_weather"}'),
        ("tool", "3"),
        ("assistant", "Three."),
    ]
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "tool_plan": "look"}
    result = {"role": "tool", "content": "3", "name": "get_weather", "tool_call_id": "c1"}
    assert messages({"messages": [ASK, calling, result, ANSWER]}) == [ASK, calling, result, ANSWER]
    old = {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}
    assert messages({"messages": [ASK, old, {"role": "function", "name": "f", "content": "3"}]})[1:] == [
        old,
        {"role": "tool", "content": "3", "name": "f"},
    ]


def test_every_other_key_of_a_turn_reaches_the_template_and_null_ones_are_not_there() -> None:
    turn = {**ANSWER, "reasoning_content": "Greet.", "thinking": "t", "prefix": True, "own": {"a": [1, None]}}
    row = read({"messages": [ASK, {**turn, "tool_calls": None, "name": None}]})
    assert row.conversation.messages[1] == turn
    assert row.unused == frozenset()
    assert messages({"messages": [ASK, {**ANSWER, "tool_calls": []}]}) == TALK


def test_text_parts_stay_parts() -> None:
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two.", "cache_control": {"type": "x"}}]
    assert messages({"messages": [{"role": "user", "content": parts}, ANSWER]})[0]["content"] == parts
    mixed = ["One. ", {"text": "Two."}, {"type": "input_text", "text": "Three.", "image": None}]
    assert messages({"messages": [{"role": "user", "content": mixed}, ANSWER]})[0]["content"] == [
        {"type": "text", "text": text} for text in ("One. ", "Two.", "Three.")
    ]


@pytest.mark.parametrize("control", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss": False}])
def test_turns_that_are_not_to_be_trained_are_known_and_the_template_does_not_see_why(control: Any) -> None:
    row = read({"messages": [ASK, {**ANSWER, **control}, ASK, {**ANSWER, "weight": 1, "train": True}]})
    assert row.conversation.messages == [*TALK, *TALK]
    assert row.conversation.untrained == {1}
    assert row.unused == frozenset()


def test_a_user_turn_is_never_trained_and_the_wish_is_reported() -> None:
    row = read({"messages": [{**ASK, "train": True}, {**ANSWER, "train": True}]})
    assert row.conversation.messages == TALK
    assert row.unused == {"messages[].train"}


def test_of_a_prompt_with_answers_only_the_completion_is_trained() -> None:
    row = read({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]})
    assert row.conversation.untrained == {1}
    assert read({"system": "s", "prompt": [ASK, ANSWER, ASK], "completion": "x"}).conversation.untrained == {2}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": TOOL},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION]), "tools": []},
        {"request": {"messages": TALK, "tools": [TOOL]}},
    ],
)
def test_tools_as_list_object_or_text(columns: Mapping[str, Any]) -> None:
    row = read({"messages": TALK, **columns} if "request" not in columns else columns)
    assert row.conversation.tools == [TOOL]


def test_no_tools_are_none_and_template_arguments_are_the_rows_own() -> None:
    assert read({"messages": TALK, "tools": []}).conversation.tools is None
    assert read({"messages": TALK, "tools": "[]"}).conversation.tools is None
    row = read({"messages": TALK, "chat_template_kwargs": '{"enable_thinking": false}'})
    assert row.conversation.template_arguments == {"enable_thinking": False}


def test_a_cut_answer_is_not_trained_and_counted() -> None:
    row = read({"messages": [ASK], "choices": [{"message": ANSWER, "finish_reason": "length"}]})
    assert (row.conversation.messages, row.conversation.untrained, row.cut_answers) == (TALK, {1}, 1)
    row = read({"messages": [ASK], "choices": [{"message": ANSWER}, {"message": ANSWER}], "usage": {}})
    assert (row.cut_answers, row.unused) == (0, {"choices[1:]", "usage"})


def test_channels_are_joined_to_a_turn() -> None:
    def said(channel: str, content: object, **more: object) -> dict[str, object]:
        return {"role": "assistant", "channel": channel, "content": content, **more}

    thought = said("analysis", [{"type": "text", "text": "Look."}], recipient=None, content_type=None)
    call = said("commentary", '{"city": "Oslo"}', recipient="functions.get_weather", content_type="json")
    talk = [ASK, thought, said("commentary", "A moment."), call]
    talk += [{"role": "tool", "name": "functions.get_weather", "content": "3", "channel": "commentary"}]
    talk += [said("analysis", "Three."), said("final", "Three degrees."), said("final", "Really.")]
    row = read({"messages": talk})
    function = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    assert row.conversation.messages == [
        ASK,
        {
            **{"role": "assistant", "content": "A moment.", "reasoning_content": "Look."},
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "content": "3", "name": "functions.get_weather"},
        {"role": "assistant", "content": "Three degrees.", "reasoning_content": "Three."},
        {"role": "assistant", "content": "Really."},
    ]
    untrained = read({"messages": [ASK, said("analysis", "a", weight=0), said("final", "b", weight=0), *TALK]})
    assert untrained.conversation.untrained == {1}


def test_tokens_with_any_mask() -> None:
    for mask in (
        {"loss_mask": [0, 1, 1]},
        {"loss_mask": [False, True, True]},
        {"assistant_masks": [0, 1, 1]},
        {"completion_mask": [0, 1, 1], "attention_mask": [1, 1, 1]},
        {"labels": [-100, 6, 7]},
    ):
        row = read({"input_ids": [5, 6, 7], **mask})
        assert (row.input_ids, row.loss_mask, row.conversation, row.unused) == ([5, 6, 7], [0, 1, 1], None, frozenset())
    padded = read({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "loss_mask": [0, 0, 1]})
    assert (padded.input_ids, padded.loss_mask) == ([5, 6], [0, 1])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_token_ids": [1, 2], "token_ids": [3]},
        {"prompt_token_ids": [1, 2], "completion_token_ids": [3]},
        {"prompt_token_ids": [1, 2], "choices": [{"token_ids": [3], "message": ANSWER}]},
        {"response": {"prompt_token_ids": [1, 2], "choices": [{"token_ids": [3], "message": ANSWER}]}},
        {"choices": [{"prompt_token_ids": [1, 2], "token_ids": [3], "message": ANSWER}]},
    ],
)
def test_ids_as_a_server_gave_them_keep_their_conversation(row: Mapping[str, Any]) -> None:
    found = read(row)
    assert (found.input_ids, found.loss_mask, found.conversation) == ([1, 2, 3], [0, 0, 1], None)
    asked = {"messages": [ASK] if "choices" in row or "response" in row else TALK}
    found = read({**row, **asked})
    assert (found.input_ids, found.conversation.messages) == ([1, 2, 3], TALK)


def test_a_conversation_without_its_answer_checks_no_ids() -> None:
    row = read({"messages": [ASK], "prompt_token_ids": [1, 2], "token_ids": [3]})
    assert (row.conversation, row.input_ids) == (None, [1, 2, 3])


def test_ids_without_a_mask_are_left_over_where_there_are_messages() -> None:
    row = read({"messages": TALK, "input_ids": [1, 2]})
    assert (row.conversation.messages, row.input_ids, row.unused) == (TALK, (), {"input_ids"})


def test_rendered_text_and_its_spans() -> None:
    row = read({"text": "<u>Hi<a>Hello.<e>", "spans": [[8, 14], [14, 17]], "source": "s", "n": None})
    assert (row.text, row.spans, row.unused) == ("<u>Hi<a>Hello.<e>", [(8, 14), (14, 17)], {"source"})
    assert read({"text": "abc", "spans": [{"start": 0, "end": 3}]}).spans == [(0, 3)]


def test_a_mapping_says_what_the_row_calls_them() -> None:
    row = {"dialogue": [{"speaker": "User", "text": "Hi"}, {"speaker": "AI", "text": "Hello.", "why": "Greet."}]}
    mapping = {"messages": "dialogue", "role": "speaker", "content": "text", "reasoning_content": "why"}
    assert messages(row, mapping) == [ASK, {**ANSWER, "reasoning_content": "Greet."}]
    deep = {"log": {"in": {"q": "Hi"}, "out": [{"a": "Hello."}]}, "key": "k1", "more": 1}
    found = read(deep, {"prompt": "log.in.q", "completion": "log.out.0.a", "id": "key"})
    assert (found.prompt_id, found.conversation.messages, found.unused) == ("k1", TALK, {"more"})
    swapped = read({"input": "Hello.", "output": "Hi"}, {"prompt": "output", "completion": "input"})
    assert swapped.conversation.messages == TALK


def test_unused_keys_are_named_and_empty_ones_are_not() -> None:
    assert read({"messages": TALK, "source": "web", "score": 0, "note": None, "id": "a"}).unused == {"source", "score"}
    assert read({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}).unused == {"rejected"}


def turn(**keys: Any) -> Mapping[str, Any]:
    return {"messages": [ASK, {"role": "assistant", **keys}]}


def part(**keys: Any) -> Mapping[str, Any]:
    return {"messages": [{"role": "user", "content": [keys]}]}


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "nothing known": ({"foo": 1}, "x.jsonl:7: has none of messages"),
    "text alone": ({"text": "a"}, "its keys are text"),
    "prompt alone": ({"prompt": "a"}, "its keys are prompt"),
    "picture": (part(type="image", image="x.png"), "messages[0].content[0]: is a part of type 'image'"),
    "sound": (part(type="input_audio", input_audio={}), "messages[0].content[0]: is a part of type 'input_audio'"),
    "part without type": (part(image="x"), "messages[0].content[0]: is a part of type None"),
    "part without text": (part(type="text"), "messages[0].content[0].text: is missing or not text"),
    "part that is a number": ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]: is a int"),
    "content of a number": (turn(content=1), "messages[1].content: is missing or not text"),
    "content null": (turn(content=None), "messages[1].content: is missing or not text"),
    "content missing": (turn(), "messages[1].content: is missing or not text"),
    "tool result that is an object": (
        {"messages": [ASK, {"role": "tool", "content": {"a": 1}}]},
        "messages[1].content: is missing or not text (write what the tool returned as JSON text)",
    ),
    "half a weight": (turn(content="a", weight=0.5), "messages[1].weight: is 0.5, and neither 0 nor 1"),
    "weight of text": (turn(content="a", weight="0"), "messages[1].weight: is '0', and neither 0 nor 1"),
    "calls that are text": (turn(tool_calls="get"), "messages[1].tool_calls: is a str"),
    "call that is a number": (turn(tool_calls=[1]), "messages[1].tool_calls[0]: is a int"),
    "call without name": (turn(tool_calls=[{"function": {}}]), "messages[1].tool_calls[0].function.name: is missing"),
    "call with odd arguments": (
        turn(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        "messages[1].tool_calls[0].function.arguments: is neither text nor an object",
    ),
    "old call of text": (turn(content="", function_call="f"), "messages[1].function_call: is a str"),
    "old call with odd name": (
        turn(content="", function_call={"name": 1}),
        "messages[1].function_call.name: is missing",
    ),
    "half a surrogate in a call": (
        turn(tool_calls=[{"function": {"name": "\ud83d"}}]),
        "messages[1]: holds half of a surrogate pair",
    ),
    "messages of broken JSON": ({"messages": "[{"}, "messages: is text that is not JSON"),
    "tools of text": ({"messages": TALK, "tools": "get_weather"}, "tools: is a str"),
    "tools of numbers": ({"messages": TALK, "tools": [1]}, "tools[0]: is a int"),
    "tools of broken JSON": ({"messages": TALK, "tools": "[{"}, "tools: is text that is not JSON"),
    "arguments of a list": ({"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs: is a list"),
    "system of a number": ({"system": 1, "messages": TALK}, "x.jsonl:7: system: is missing or not text"),
    "no choices": ({"messages": [ASK], "choices": []}, "choices: is not a list of choices"),
    "text completion": ({"messages": [ASK], "choices": [{"text": "a"}]}, "choices[0].message: is missing"),
    "choices alone": ({"choices": [{"message": ANSWER}]}, "has an answer, and not the messages it answers"),
    "failed call": ({"body": {"messages": [ASK]}, "response": {"status_code": 429}}, "response: is a failed call"),
    "completion of a number": ({"prompt": "Hi", "completion": 3}, "completion: is 3"),
    "completion without turns": ({"prompt": "Hi", "completion": []}, "completion: is not a list of turns"),
    "history of text": ({"instruction": "a", "output": "b", "history": "c"}, "history: is not a list of rounds"),
    "history of one": ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0]: is no round"),
    "input of a number": ({"instruction": "a", "input": 3, "output": "b"}, "input: is not text"),
    "channel unknown": ({"messages": [ASK, {**ANSWER, "channel": "x"}]}, "messages[1].channel: unknown channel 'x'"),
    "channels trained in part": (
        {"messages": [ASK, {**ANSWER, "channel": "analysis", "weight": 0}, {**ANSWER, "channel": "final"}]},
        "messages[1]: is one turn with the messages after it",
    ),
    "labels shifted": ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1]: is 3 where input_ids has 2"),
    "labels short": ({"input_ids": [1, 2], "labels": [-100]}, "labels: has 1 entries, input_ids 2"),
    "served ids of text": (
        {"prompt_token_ids": ["a"], "token_ids": [3]},
        "prompt_token_ids: is not a list",
    ),
    "served ids empty": ({"prompt_token_ids": [1], "token_ids": []}, "token_ids: is not a list of token ids"),
    "ids alone": ({"input_ids": [1]}, "loss_mask: is missing"),
    "span outside": ({"text": "abc", "spans": [[1, 4]]}, "spans[0]: is [1, 4]: outside the text of 3"),
    "spans out of order": ({"text": "abc", "spans": [[2, 3], [0, 1]]}, "spans[1]: is [0, 1]"),
    "span empty": ({"text": "abc", "spans": [[1, 1]]}, "spans[0]: is [1, 1]"),
    "span of text": ({"text": "abc", "spans": [["a", "b"]]}, "spans[0]: is not a span"),
    "spans of a number": ({"text": "abc", "spans": 3}, "spans: is not a list of spans"),
    "text of a number": ({"text": 1, "spans": []}, "text: is not text"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_malformed_row_is_an_error_that_names_file_row_and_key(case: str) -> None:
    row, message = BAD[case]
    with pytest.raises(DataError) as caught:
        read(row)
    assert message in str(caught.value)
    assert caught.value.where.startswith("x.jsonl:7")
    assert caught.value.hint


def test_the_message_about_unknown_keys_says_what_was_mapped() -> None:
    with pytest.raises(DataError, match=r"its keys are talk \(data.mapping: messages: dialogue\).*data.mapping"):
        read({"talk": TALK}, {"messages": "dialogue"})
