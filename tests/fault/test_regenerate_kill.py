# SPDX-License-Identifier: Apache-2.0
"""Regeneration that is killed at any moment goes on where it was, gives the same set, and asks nothing twice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from chat_service import ChatService, Json, chat_service, complete
from command_line import make_run_file
from regenerating import contents, forks, read_answers, write_talks
from specforge_core.run.answer_log import RecordedAnswers
from tiny_model import TinyModel

TALKS = 64
MOST_KILLS = 6


def write_run(tmp_path: Path, tiny_model: TinyModel, **regenerate: object) -> None:
    source = write_talks(tmp_path / "talks.jsonl", TALKS)
    settings = {"max_tokens": 12, "batch_size": 8, **regenerate}
    make_run_file(tiny_model, tmp_path / "run.yaml", data={"train": [str(source)], "eval": []}, regenerate=settings)


def recorded(tmp_path: Path) -> set[int]:
    """Which conversations were recorded before the kill."""
    work = tmp_path / "run" / "regenerated" / ".train.partial"
    if not (work / "asked.i64").exists():
        return set()
    answers = RecordedAnswers(work, TALKS)
    answers.refresh()
    found = answers.known(0, TALKS)
    answers.close()
    return found


def asked_of(body: Json) -> int:
    return int(str(body["messages"][0]["content"]).split()[1].split(".")[0])


def test_sigkill_while_servers_answer(tmp_path: Path, tiny_model: TinyModel) -> None:
    def slowly(service: ChatService, body: Json) -> tuple[int, Json]:
        time.sleep(0.01)
        return 200, complete(body)

    generator = random.Random(5)
    with chat_service() as service:
        service.behave = slowly
        write_run(tmp_path, tiny_model, servers=[service.address], concurrency=4)
        with forks("run.yaml", cwd=tmp_path) as processes:
            kills = 0
            while True:
                before = recorded(tmp_path)
                first = len(service.asked)
                pid = processes.start()
                if kills < MOST_KILLS:
                    time.sleep(generator.uniform(0.2, 1.2))
                    os.kill(pid, signal.SIGKILL)
                status = processes.wait()
                assert not before & {asked_of(body) for body in service.asked[first:]}, (
                    "nothing recorded is asked again"
                )
                if status != -signal.SIGKILL:
                    break
                kills += 1
            assert status == 0, (tmp_path / "fork.log").read_text()
        assert kills >= 2
        killed = contents(tmp_path / "run" / "regenerated" / "train")
        again = tmp_path / "again"
        with forks("run.yaml", f"regenerate.output={again}", cwd=tmp_path) as processes:
            processes.start()
            assert processes.wait() == 0
    assert killed == contents(again / "train")
    rows = read_answers(again / "train")
    assert [row["id"] for row in rows] == [f"talk-{number}" for number in range(TALKS)]
    assert sorted(path.name for path in (tmp_path / "run" / "regenerated").iterdir()) == [".train.lock", "train"]


@pytest.mark.parametrize("most_kills", [2])
def test_sigkill_while_the_engine_answers_in_batches(tmp_path: Path, tiny_model: TinyModel, most_kills: int) -> None:
    write_run(tmp_path, tiny_model)
    generator = random.Random(9)
    kills, found = 0, []
    with forks("run.yaml", cwd=tmp_path) as processes:
        while True:
            pid = processes.start()
            if kills < most_kills:
                time.sleep(generator.uniform(1.0, 3.0))
                os.kill(pid, signal.SIGKILL)
            status = processes.wait()
            if status != -signal.SIGKILL:
                break
            kills += 1
            found.append(len(recorded(tmp_path)))
        assert status == 0, (tmp_path / "fork.log").read_text()
    assert kills > 0
    assert found == sorted(found)
    assert all(count % 8 == 0 for count in found), "what was asked together is recorded together"
    again = tmp_path / "again"
    with forks("run.yaml", f"regenerate.output={again}", cwd=tmp_path) as processes:
        processes.start()
        assert processes.wait() == 0
    assert contents(tmp_path / "run" / "regenerated" / "train") == contents(again / "train")


def test_two_processes_share_the_work(tmp_path: Path, tiny_model: TinyModel) -> None:
    def slowly(service: ChatService, body: Json) -> tuple[int, Json]:
        time.sleep(0.02)
        return 200, complete(body)

    with chat_service() as service:
        service.behave = slowly
        write_run(tmp_path, tiny_model, servers=[service.address], concurrency=4)
        with forks("run.yaml", cwd=tmp_path) as one, forks("run.yaml", cwd=tmp_path) as other:
            pids = [one.start(), other.start()]
            assert len(set(pids)) == 2
            assert (one.wait(), other.wait()) == (0, 0), (tmp_path / "fork.log").read_text()
        answers = sum(1 + number % 2 for number in range(TALKS))
        assert len(service.asked) == answers, "each answer is asked for once"
        assert service.most_at_once > 4, "by both at a time"
    assert len(read_answers(tmp_path / "run" / "regenerated" / "train")) == TALKS


def test_what_a_killed_process_had_goes_to_the_others(tmp_path: Path, tiny_model: TinyModel) -> None:
    def slowly(service: ChatService, body: Json) -> tuple[int, Json]:
        time.sleep(0.02)
        return 200, complete(body)

    with chat_service() as service:
        service.behave = slowly
        write_run(tmp_path, tiny_model, servers=[service.address], concurrency=4)
        with forks("run.yaml", cwd=tmp_path) as one, forks("run.yaml", cwd=tmp_path) as other:
            pid = one.start()
            other.start()
            deadline = time.monotonic() + 60
            while len(recorded(tmp_path)) < 10:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(pid, signal.SIGKILL)
            assert (one.wait(), other.wait()) == (-signal.SIGKILL, 0), (tmp_path / "fork.log").read_text()
    assert len(read_answers(tmp_path / "run" / "regenerated" / "train")) == TALKS
