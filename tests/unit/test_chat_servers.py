# SPDX-License-Identifier: Apache-2.0
"""Servers as a source of answers: over real sockets, with every way in which a server can misbehave."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from chat_service import ChatService, serving
from specforge_core.config.run_config import RegenerateSection
from specforge_core.contracts import ConfigError, GeneratedAnswer, GenerationRequest, GenerationSettings, TargetError
from specforge_core.prompts.regeneration import chat_request, chat_servers
from specforge_core.prompts.regeneration.chat_servers import ChatServers


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_servers, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(chat_servers, "_TICK_SECONDS", 0.02)


@pytest.fixture
def service() -> Iterator[ChatService]:
    with serving(ChatService()) as started:
        yield started


def source(*services: ChatService, key: str | None = None, **settings: Any) -> ChatServers:
    given = {"timeout_seconds": 5.0, "retries": 3, "concurrency": 8, **settings}
    return ChatServers(RegenerateSection(servers=[one.address for one in services], **given), key=key)


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{n}", [{"role": "user", "content": f"question {n}"}]) for n in range(count)]


def ask(servers: ChatServers, count: int = 1, **settings: Any) -> dict[str, GeneratedAnswer]:
    servers.describe()
    return {a.request_id: a for a in servers.answer(requests(count), GenerationSettings(**settings))}


def test_answers_come_with_ids_thoughts_and_usage(service: ChatService) -> None:
    servers = source(service)
    assert servers.describe() == {"model": "tiny", "servers": f"{service.address} 1.2.3"}
    [answer] = servers.answer(requests(1), GenerationSettings(max_tokens=7))
    assert (answer.content, answer.thought, answer.finish_reason) == ("QUESTION 0", "I shout.", "stop")
    assert answer.token_ids == [*b"QUESTION 0", 257]
    assert answer.prompt_ids is not None
    assert answer.usage == {"prompt_tokens": 3, "completion_tokens": 10}
    assert service.bodies[0]["max_tokens"] == 7
    assert "chat_template_kwargs" not in service.bodies[0]


def test_many_are_in_flight_over_several_servers(service: ChatService) -> None:
    service.seconds = 0.05
    with serving(ChatService(seconds=0.05)) as other:
        answers = ask(source(service, other, concurrency=16), 64)
    assert sorted(answers) == sorted(f"r{n}" for n in range(64))
    assert 4 < service.most_at_once <= 16
    assert min(sum(service.asked.values()), sum(other.asked.values())) > 10


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_server_that_is_busy_is_asked_again(service: ChatService, status: int) -> None:
    service.fail, service.retry_after = [status, status], "0"
    assert ask(source(service))["r0"].content == "QUESTION 0"
    assert service.asked["question 0"] == 3


def test_dropped_connections_and_answers_that_are_none_are_tried_again(service: ChatService) -> None:
    service.drop = 2
    assert ask(source(service))["r0"].finish_reason == "stop"
    service.body = b"{}"
    answer = ask(source(service))["r0"]
    assert (answer.finish_reason, "no chat completion" in answer.error) == ("failed", True)
    service.body = b"\xff not json"
    assert "not JSON" in ask(source(service))["r0"].error


def test_a_refused_request_fails_at_once_with_the_servers_words(service: ChatService) -> None:
    service.fail = [400]
    answers = ask(source(service, concurrency=1), 2)
    assert "told to say 400" in answers["r0"].error
    assert answers["r1"].finish_reason == "stop"
    assert service.asked["question 0"] == 1


def test_a_field_that_a_server_does_not_know_is_left_out(service: ChatService, caplog: Any) -> None:
    service.unknown = "return_token_ids"
    with caplog.at_level(logging.WARNING):
        answers = ask(source(service, concurrency=1), 2)
    assert [answers[f"r{n}"].token_ids for n in range(2)] == [None, None]
    assert caplog.text.count("does not take return_token_ids") == 1


def test_keys_models_and_addresses(service: ChatService) -> None:
    service.key = "secret-key"
    with pytest.raises(TargetError, match="a key is needed") as refused:
        source(service, key="wrong-key").describe()
    assert "wrong-key" not in str(refused.value)
    assert "secret-key" not in str(source(service, key="secret-key").describe())
    service.models = ["a", "b"]
    with pytest.raises(ConfigError, match="serves a, b"):
        source(service, key="secret-key").describe()
    assert source(service, key="secret-key", model="b").describe()["model"] == "b"
    for address in ("host:8000", "ftp://host/v1", "http://u:p@host/v1", "http://host:99999/v1"):
        with pytest.raises(ConfigError, match="address"):
            ChatServers(RegenerateSection(servers=[address]), key=None)


def test_how_answers_end(service: ChatService) -> None:
    service.finish_reason = "length"
    assert ask(source(service))["r0"].finish_reason == "length"
    service.finish_reason = "content_filter"
    assert "content_filter" in ask(source(service))["r0"].error


def test_an_endless_answer_is_not_read(service: ChatService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_request, "MAX_BODY_BYTES", 100)
    service.body = b" " * 1000
    assert "longer than 100 bytes" in ask(source(service, retries=0))["r0"].error


def test_servers_that_are_gone_end_the_run_and_come_back() -> None:
    with serving(ChatService()) as service:
        servers = source(service, timeout_seconds=0.5, retries=100)
        servers.describe()
        port = int(service.address.split(":")[2].split("/")[0])
    began = time.monotonic()
    with pytest.raises(TargetError, match="no server answers"):
        list(servers.answer(requests(3), GenerationSettings()))
    assert time.monotonic() - began < 10
    with serving(ChatService(), port=port):
        assert len(list(servers.answer(requests(3), GenerationSettings()))) == 3


def test_requests_may_wait_for_answers(service: ChatService) -> None:
    seen: list[str] = []

    def one_after_the_other() -> Iterator[GenerationRequest | None]:
        for number, request in enumerate(requests(4)):
            while len(seen) < number:
                yield None
            yield request

    servers = source(service)
    servers.describe()
    for answer in servers.answer(one_after_the_other(), GenerationSettings()):
        seen.append(answer.request_id)
    assert seen == ["r0", "r1", "r2", "r3"]


def test_nothing_goes_on_once_nobody_listens(service: ChatService) -> None:
    service.seconds = 0.05
    servers = source(service)
    servers.describe()
    answers = servers.answer(requests(1000), GenerationSettings())
    next(answers)
    answers.close()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("answers") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sum(service.asked.values()) < 30
