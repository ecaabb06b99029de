# SPDX-License-Identifier: Apache-2.0
"""Answers from servers: many at once, from several, whatever the servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_service import ChatService, Json, answer_to, chat_service, complete, wait_until
from specforge_core.contracts import (
    DataError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    RunStopped,
    StopSignal,
    TargetError,
)
from specforge_core.prompts.regeneration import server_pool
from specforge_core.prompts.regeneration.chat_api import make_body, read_answer
from specforge_core.prompts.regeneration.chat_servers import ChatServers, ServerSettings

SETTINGS = GenerationSettings(max_tokens=32)


@pytest.fixture
def service() -> Iterator[ChatService]:
    with chat_service() as service:
        yield service


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (server_pool, __import__("specforge_core.prompts.regeneration.chat_servers", fromlist=["_"])):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.1)


def request(number: int, **more: Any) -> GenerationRequest:
    return GenerationRequest(f"r{number}", [{"role": "user", "content": f"prompt {number}"}], seed=number, **more)


def servers(*services: ChatService, stop: StopSignal | None = None, **settings: Any) -> ChatServers:
    given = {"concurrency": 8, "timeout_seconds": 10.0, "retries": 3, **settings}
    addresses = tuple(service.address for service in services)
    return ChatServers(ServerSettings(addresses=addresses, **given), stop=stop or StopSignal())


def ask(source: ChatServers, count: int, **more: Any) -> dict[str, GeneratedAnswer]:
    wanted = iter([request(number, **more) for number in range(count)])
    try:
        return {answer.request_id: answer for answer in source.answer(wanted, SETTINGS)}
    finally:
        source.close()


def test_answers_come_with_ids_usage_and_who_made_them(service: ChatService) -> None:
    source = servers(service)
    assert source.describe() == {"model": "tiny", "server": "7.8.9"}
    answer = ask(source, 1)["r0"]
    assert (answer.finish_reason, answer.content) == ("stop", answer_to(service.asked[0]))
    assert answer.prompt_ids
    assert answer.token_ids
    assert answer.usage == {"prompt_tokens": len(answer.prompt_ids), "completion_tokens": len(answer.token_ids)}


def test_hundreds_are_in_flight(service: ChatService) -> None:
    everybody = threading.Barrier(200)

    def together(service: ChatService, body: Json) -> tuple[int, Json]:
        everybody.wait(timeout=60)
        return 200, complete(body)

    service.behave = together
    assert len(ask(servers(service, concurrency=200, timeout_seconds=60), 200)) == 200
    assert service.most_at_once == 200


def test_requests_that_depend_on_answers_are_asked_for_again(service: ChatService) -> None:
    source, answered = servers(service), list[str]()

    def one_after_the_other() -> Iterator[GenerationRequest | None]:
        for number in range(5):
            while len(answered) < number:
                yield None
            yield request(number)

    for answer in source.answer(one_after_the_other(), SETTINGS):
        answered.append(answer.request_id)
    source.close()
    assert answered == ["r0", "r1", "r2", "r3", "r4"]


def test_servers_share_the_work_by_what_they_have_in_flight() -> None:
    with chat_service() as slow, chat_service() as quick:

        def wait(service: ChatService, body: Json) -> tuple[int, Json]:
            time.sleep(0.3)
            return 200, complete(body)

        slow.behave = wait
        assert len(ask(servers(slow, quick), 40)) == 40
        assert 4 <= len(slow.asked) < len(quick.asked)


@pytest.mark.parametrize("trouble", [429, 500, 503, b"not json", {"choices": []}, {"choices": [{"message": 3}]}])
def test_what_a_server_could_not_do_is_tried_again(service: ChatService, trouble: Any) -> None:
    def fail_twice(service: ChatService, body: Json) -> tuple[int, Any]:
        if len(service.asked) > 2:
            return 200, complete(body)
        return (trouble, {"error": {"message": "busy"}}) if isinstance(trouble, int) else (200, trouble)

    service.behave = fail_twice
    assert ask(servers(service), 1)["r0"].finish_reason == "stop"
    assert len(service.asked) == 3


def test_a_request_that_fails_each_time_is_an_answer_that_says_why(service: ChatService) -> None:
    service.behave = lambda service, body: (500, {"error": {"message": "out of luck"}})
    answer = ask(servers(service), 1)["r0"]
    assert answer.finish_reason == "failed"
    assert "status 500 out of luck" in answer.error
    assert len(service.asked) == 4


def test_a_request_that_is_refused_is_not_tried_again_but_without_ids(service: ChatService) -> None:
    service.behave = lambda service, body: (400, {"message": "context length exceeded"})
    answer = ask(servers(service), 1)["r0"]
    assert "status 400 context length exceeded" in answer.error
    assert ["return_token_ids" in body for body in service.asked] == [True, False]


def test_a_server_that_knows_no_token_ids_is_asked_without(service: ChatService) -> None:
    def strict(service: ChatService, body: Json) -> tuple[int, Json]:
        return (400, {"message": "unknown key"}) if "return_token_ids" in body else (200, complete(body))

    service.behave = strict
    made = ask(servers(service, concurrency=1), 3)
    assert {answer.token_ids for answer in made.values()} == {None}
    assert len(service.asked) == 4


def test_one_refused_request_does_not_take_the_ids_from_the_others(service: ChatService) -> None:
    def too_long(service: ChatService, body: Json) -> tuple[int, Json]:
        long = len(service.asked) <= 2  # the first request, with ids and without
        return (400, {"message": "context length exceeded"}) if long else (200, complete(body))

    service.behave = too_long
    made = ask(servers(service, concurrency=1), 3)
    assert [made[f"r{number}"].finish_reason for number in range(3)] == ["failed", "stop", "stop"]
    assert all(made[f"r{number}"].token_ids for number in (1, 2))


def test_cut_answers_and_thoughts_and_calls_are_told_apart(service: ChatService) -> None:
    call = {"id": "c9", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    replies: list[Callable[[Json], Json]] = [
        lambda body: complete(body, content="much", finish_reason="length"),
        lambda body: complete(body, content="so", reasoning_content="hm"),
        lambda body: complete(body, content=None, finish_reason="tool_calls", tool_calls=[call]),
        lambda body: complete(body, finish_reason="content_filter"),
    ]
    service.behave = lambda service, body: (200, replies[int(body["messages"][0]["content"].split()[1])](body))
    made = ask(servers(service), 4)
    assert [made[f"r{n}"].finish_reason for n in range(4)] == ["length", "stop", "calls", "failed"]
    assert (made["r1"].thought, made["r1"].content) == ("hm", "so")
    assert made["r2"].tool_calls == [call]
    assert "content_filter" in made["r3"].error


def test_a_server_that_dies_is_left_out_and_comes_back() -> None:
    with chat_service() as steady:
        mortal = ChatService()

        def slowly(service: ChatService, body: Json) -> tuple[int, Json]:
            time.sleep(0.02)
            return 200, complete(body)

        steady.behave = mortal.behave = slowly
        source = servers(steady, mortal)
        wanted = iter([request(number) for number in range(300)])
        made, heir = [], None
        for answer in source.answer(wanted, SETTINGS):
            made.append(answer)
            if len(made) == 50:
                mortal.die()
            if len(made) == 100:
                heir = ChatService(mortal.port)
        source.close()
        assert {answer.finish_reason for answer in made} == {"stop"}
        assert len(made) == 300
        assert heir is not None
        assert heir.asked, "it was asked again once it was back"
        heir.die()


def test_when_no_server_is_left_the_work_ends_and_says_so() -> None:
    service = ChatService()
    source = servers(service, timeout_seconds=0.5)
    source.describe()
    service.die()
    with pytest.raises(TargetError, match="no server has answered for"):
        ask(source, 3)


def test_a_server_that_says_nothing_does_not_hold_anybody_up(service: ChatService) -> None:
    let_go = threading.Event()

    def hang(service: ChatService, body: Json) -> tuple[int, Json]:
        let_go.wait(30)
        return 200, complete(body)

    service.behave = hang
    began = time.monotonic()
    answer = ask(servers(service, timeout_seconds=0.3, retries=1), 1)["r0"]
    let_go.set()
    assert "did not answer in time" in answer.error
    assert time.monotonic() - began < 10


def test_a_stop_is_heeded_while_answers_are_awaited(service: ChatService) -> None:
    stop, let_go = StopSignal(), threading.Event()

    def hang(service: ChatService, body: Json) -> tuple[int, Json]:
        let_go.wait(30)
        return 200, complete(body)

    service.behave = hang
    source = servers(service, stop=stop)
    threading.Thread(target=lambda: (wait_until(lambda: bool(service.asked)), stop.request("enough"))).start()
    with pytest.raises(RunStopped):
        ask(source, 3)
    let_go.set()


def test_keys_and_models_and_addresses(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    with chat_service(key="s3cret", models=("a", "b")) as service:
        with pytest.raises(TargetError, match="401 wrong key"):
            servers(service, model="a").describe()
        with pytest.raises(TargetError, match="a, b"):
            servers(service, api_key_file=key).describe()
        with pytest.raises(TargetError, match="a, b"):
            servers(service, api_key_file=key, model="c").describe()
        assert servers(service, api_key_file=key, model="b").describe()["model"] == "b"
        with pytest.raises(TargetError, match="404"):
            ChatServers(
                ServerSettings(addresses=[service.address[:-3]], api_key_file=key), stop=StopSignal()
            ).describe()
    for address in ("ftp://host/v1", "host:80", "http://", "http://u:p@host/v1", "http://host:99999/v1"):
        with pytest.raises(DataError) as refused:
            ChatServers(ServerSettings(addresses=[address]), stop=StopSignal())
        assert refused.value.where == "regenerate.servers"
        assert "u:p" not in str(refused.value)
    with pytest.raises(DataError, match="key"):
        ChatServers(ServerSettings(addresses=[], api_key_file=tmp_path / "none"), stop=StopSignal())


def test_what_is_asked(service: ChatService) -> None:
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = GenerationRequest("r", turns, tools=tools, arguments={"enable_thinking": False}, seed=5)
    given = GenerationSettings(temperature=0.5, top_p=0.9, top_k=7, max_tokens=11)
    body = json.loads(make_body(asked, given, model="m", ask_ids=True))
    assert body["messages"][0]["tool_calls"][0] == {
        "id": "call_0",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    told = {key: body[key] for key in body.keys() - {"messages"}}
    assert told == {
        **{"model": "m", "temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_tokens": 11, "seed": 5, "stream": False},
        **{"tools": tools, "chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"content": 3},
        {"content": "\ud800"},
        {"reasoning_content": ["x"]},
        {"tool_calls": "x"},
        {"tool_calls": [{}]},
        {"tool_calls": [{"function": {"name": 3}}]},
        {"token_ids": "abc"},
        {"token_ids": [-1]},
        {"token_ids": [2**40]},
        {"token_ids": [True]},
        {"prompt_token_ids": [1.5]},
    ],
)
def test_what_contradicts_itself_is_no_answer(change: Json) -> None:
    body = complete({"messages": [], "model": "m"}, content="x")
    choice = body["choices"][0]
    (choice if "token_ids" in change else choice["message"]).update(change)
    if "prompt_token_ids" in change:
        body |= change
    with pytest.raises(ValueError):
        read_answer("r", body)
