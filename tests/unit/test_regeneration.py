# SPDX-License-Identifier: Apache-2.0
"""Conversations answered anew: what is asked, what is spliced in, how each ends, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from specforge_core.contracts import (
    DataError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    SilentProgress,
    StopSignal,
)
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.reading.rows import parse_row
from specforge_core.prompts.regeneration.dialogue import Dialogue
from specforge_core.prompts.regeneration.journal import Journal, Journals
from specforge_core.prompts.regeneration.loop import RegenerationLoop

CALL = {"id": "new", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "old"}


def said(text: str, reason: str = "stop", **more: Any) -> GeneratedAnswer:
    return GeneratedAnswer("r", reason, content=text, **more)  # type: ignore[arg-type]


TALK = [user("a?"), assistant("old a"), user("b?"), assistant("old b"), user("thanks")]
AGENT = [user("Oslo?"), assistant("", tool_calls=[{**CALL, "id": "old"}]), tool("3"), assistant("Three."), user("x")]

ENDS = {
    "every answer": (TALK, [said("A"), said("B")], "answered", ["a?", "A", "b?", "B"]),
    "cut": (TALK, [said("A", "length")], "cut", ["a?", "A"]),
    "failed": (TALK, [said("A"), said("", "failed", error="no")], "failed", ["a?", "A", "b?"]),
    "calls": (AGENT, [said("", "calls", tool_calls=[CALL]), said("3")], "answered", ["Oslo?", "", "3", "3"]),
    "no call": (AGENT, [said("No idea.")], "calls_missing", ["Oslo?", "No idea."]),
    "a call too much": (TALK, [said("", "calls", tool_calls=[CALL])], "results_missing", ["a?", ""]),
}


@pytest.mark.parametrize("case", list(ENDS))
def test_how_a_conversation_ends(case: str) -> None:
    source, answers, ending, contents = ENDS[case]
    dialogue = Dialogue("id", Conversation(source), last_only=False)
    for answer in answers:
        assert not dialogue.ending
        dialogue.take(answer)
    assert dialogue.ending == ending
    assert [message["content"] for message in dialogue.messages] == contents
    [row] = dialogue.rows()
    assert row["made"]["ending"] == ending
    assert row["made"]["finish_reasons"] == [answer.finish_reason for answer in answers]


def test_each_answer_is_asked_upon_those_before_it() -> None:
    dialogue = Dialogue("id", Conversation(TALK), last_only=False)
    assert [message["content"] for message in dialogue.messages] == ["a?"]
    dialogue.take(said("A", thought="hm"))
    assert dialogue.messages == [user("a?"), assistant("A", reasoning_content="hm"), user("b?")]


def test_the_last_answer_alone_leaves_the_others_and_does_not_train_them() -> None:
    dialogue = Dialogue("id", Conversation(TALK), last_only=True)
    assert [message["content"] for message in dialogue.messages] == ["a?", "old a", "b?"]
    dialogue.take(said("B"))
    row = parse_row(dialogue.rows()[0], prompt_id="x", where="f:1")
    assert row.conversation is not None
    assert row.conversation.untrained == {1}


def test_results_belong_to_the_targets_own_calls() -> None:
    dialogue = Dialogue("id", Conversation(AGENT), last_only=False)
    dialogue.take(said("", "calls", tool_calls=[CALL]))
    assert dialogue.messages[-1] == {**tool("3"), "tool_call_id": "new"}


def test_a_cut_answer_is_not_trained_as_if_it_were_complete() -> None:
    dialogue = Dialogue("id", Conversation(TALK), last_only=False)
    dialogue.take(said("A", "length"))
    row = parse_row(dialogue.rows()[0], prompt_id="x", where="f:1")
    assert row.conversation is not None
    assert row.conversation.untrained == {1}


def test_token_ids_as_served_are_one_row_while_they_continue_each_other() -> None:
    dialogue = Dialogue("id", Conversation(TALK), last_only=False)
    dialogue.take(said("A", prompt_ids=[1, 2], token_ids=[3, 9]))
    dialogue.take(said("B", prompt_ids=[1, 2, 3, 9, 4], token_ids=[5, 9]))
    [row] = dialogue.rows()
    assert (row["input_ids"], row["loss_mask"]) == ([1, 2, 3, 9, 4, 5, 9], [0, 0, 1, 1, 0, 1, 1])
    rewritten = Dialogue("id", Conversation(TALK), last_only=False)
    rewritten.take(said("A", prompt_ids=[1, 2], token_ids=[3, 9]))
    rewritten.take(said("B", prompt_ids=[1, 2, 9, 4], token_ids=[5, 9]))
    first, second = rewritten.rows()
    assert (first["id"], second["id"]) == ("id", "id.2")
    assert second["loss_mask"] == [0, 0, 0, 0, 1, 1]
    read = parse_row(second, prompt_id="x", where="f:1")
    assert list(read.input_ids) == [1, 2, 9, 4, 5, 9]


def test_a_journal_keeps_what_was_whole_and_merges_in_order(tmp_path: Path) -> None:
    with Journal(tmp_path, "one") as one, Journal(tmp_path, "two") as two:
        two.append(5, [{"id": "f"}], "answered")
        one.append(2, [{"id": "c"}, {"id": "c.2"}], "cut")
    with (tmp_path / "one.journal").open("ab") as torn:
        torn.write(b'{"place": 3, "rows": [{"id"')
    view = Journals(tmp_path)
    view.refresh()
    assert view.endings == {2: "cut", 5: "answered"}
    with Journal(tmp_path, "one") as one:
        one.append(0, [{"id": "a"}], "answered")
    view.refresh()
    view.merge(tmp_path / "rows.jsonl")
    assert [json.loads(line)["id"] for line in (tmp_path / "rows.jsonl").open()] == ["a", "c", "c.2", "f"]
    (tmp_path / "bad.journal").write_text("{}\n")
    with pytest.raises(DataError, match=r"bad\.journal: is damaged"):
        view.refresh()


class Echo:
    """Answers a few requests at once, in the reverse of their order."""

    in_flight = 3

    def describe(self) -> Mapping[str, str]:
        return {"model": "echo"}

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        waiting = iter(requests)
        while True:
            batch = []
            for request in waiting:
                if request is None:
                    break
                batch.append(request)
                if len(batch) == self.in_flight:
                    break
            if not batch:
                return
            for request in reversed(batch):
                yield GeneratedAnswer(request.request_id, "stop", content=request.messages[-1]["content"].upper())

    def close(self) -> None:
        pass


class Batches:
    """Conversations in batches of two, all for this process."""

    def __init__(self, dialogues: Sequence[Dialogue]):
        places = list(enumerate(dialogues))
        self.left = [places[n : n + 2] for n in range(0, len(places), 2)]
        self.finished: list[Sequence[int]] = []

    def take(self, *, wait: bool) -> Sequence[tuple[int, Dialogue]] | None:
        return self.left.pop(0) if self.left else None

    def finish(self, places: Sequence[int]) -> None:
        self.finished.append(places)

    @property
    def exhausted(self) -> bool:
        return not self.left


def test_many_conversations_turn_by_turn(tmp_path: Path) -> None:
    def ask(dialogue: Dialogue) -> GenerationRequest:
        if dialogue.prompt_id == "3":
            raise DataError("the template refuses it", where="chat template")
        return GenerationRequest(f"{dialogue.prompt_id}/{dialogue.turn}", dialogue.messages)

    claims = Batches([Dialogue(str(n), Conversation(TALK), last_only=False) for n in range(7)])
    with Journal(tmp_path, "one") as journal:
        RegenerationLoop(
            source=Echo(),
            settings=GenerationSettings(),
            claims=claims,
            journal=journal,
            ask=ask,
            progress=SilentProgress(),
            stop=StopSignal(),
        ).run()
    view = Journals(tmp_path)
    view.refresh()
    assert view.endings == {n: "failed" if n == 3 else "answered" for n in range(7)}
    assert sorted(place for places in claims.finished for place in places) == list(range(7))
    view.merge(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [m["content"] for m in rows[0]["messages"]] == ["a?", "A?", "b?", "B?"]
    assert "the template refuses it" in rows[3]["made"]["error"]
