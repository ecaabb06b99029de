# SPDX-License-Identifier: Apache-2.0
"""Worker processes: the same prompts in the same order for any number of them, and what becomes of one that fails."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
from armed_tokenizer import VOCABULARY, Armed, ArmedTokenizer
from preparing import contents, mixed_rows, prepare, talk, write_rows
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, PlanError, SpecForgeError, TargetError
from specforge_core.prompts.encoder_processes import WorkerLost, encode_in_order
from specforge_core.prompts.reading.raw_rows import Record
from specforge_core.prompts.row_encoder import Chunk, EncodingWork


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", mixed_rows(300))


def test_the_set_is_the_same_for_any_number_of_workers(tmp_path: Path, source: Path) -> None:
    other = write_rows(tmp_path / "b.jsonl", mixed_rows(40, seed=6))
    alone = contents(prepare([source, other], tmp_path / "one"))
    assert set(alone) > {"rejects.jsonl", "manifest.json"}
    assert contents(prepare([source, other], tmp_path / "three", workers=3)) == alone
    assert multiprocessing.active_children() == []


def test_so_many_prompts_are_the_same_first_ones(tmp_path: Path, source: Path) -> None:
    write_rows(tmp_path / "b.jsonl", ["[not read"])
    sources = [source, tmp_path / "b.jsonl"]
    alone = prepare(sources, tmp_path / "one", max_prompts=50)
    assert len(alone) == 50
    assert contents(prepare(sources, tmp_path / "two", max_prompts=50, workers=2)) == contents(alone)


def test_the_first_bad_row_is_the_one_that_is_named(tmp_path: Path) -> None:
    rows = [talk("good")] * 70 + [{"messages": 1}] + [talk("good")] * 70 + ["{"] * 10
    source = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl:71: messages: is not a list") as caught:
        prepare([source], tmp_path / "set", workers=2, on_bad_row="stop")
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.lock", "a.jsonl"]


def test_a_worker_that_dies_is_an_error_that_names_its_rows(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [*[talk("good")] * 100, talk("KILL-ME"), *[talk("good")] * 100])
    with pytest.raises(WorkerLost, match=r"a\.jsonl:97 to 128: .*ended by signal 9"):
        prepare([source], tmp_path / "set", workers=2)
    assert multiprocessing.active_children() == []


def chunk(text: str, first: int) -> Chunk:
    return Chunk(0, "a.jsonl", "a", first, (Record(first + 1, talk(text)),))


def test_a_worker_that_stands_still_is_given_up(tmp_path: Path) -> None:
    work = EncodingWork(Armed(), DataSection(train=[tmp_path / "a.jsonl"]), VOCABULARY)
    began = time.monotonic()
    with pytest.raises(WorkerLost, match=r"a\.jsonl:2 to 2: .*no result for 4 s"):
        list(encode_in_order([chunk("good", 0), chunk("STOP-ME", 1)], work, workers=2, deadline_seconds=4))
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []


def test_what_a_worker_cannot_do_is_the_error_that_it_met(tmp_path: Path, source: Path) -> None:
    with pytest.raises(TargetError, match="armed: there is no tokenizer"):
        prepare([source], tmp_path / "set", workers=2, tokenizer=Armed(failing=True))
    failing = write_rows(tmp_path / "b.jsonl", [talk("FAIL-ME")])
    with pytest.raises(TargetError) as caught:
        prepare([failing], tmp_path / "set", workers=2)
    assert (caught.value.message, caught.value.where, caught.value.hint) == (
        "the tokenizer gave up",
        "armed",
        "disarm it",
    )


def test_a_tokenizer_that_cannot_be_sent_encodes_here(tmp_path: Path, source: Path) -> None:
    here = prepare([source], tmp_path / "here", workers=2, tokenizer=lambda: ArmedTokenizer())
    assert contents(here) == contents(prepare([source], tmp_path / "there", workers=2))


def test_a_slow_row_holds_up_no_order(tmp_path: Path) -> None:
    rows = [talk(f"TAKE-YOUR-TIME {number}" if number % 50 == 0 else f"answer {number}") for number in range(200)]
    source = write_rows(tmp_path / "a.jsonl", rows)
    prompts = prepare([source], tmp_path / "set", workers=3)
    assert [prompt.prompt_id for prompt in prompts] == [f"a-{number:05d}" for number in range(200)]


@pytest.mark.parametrize(
    "error", [DataError("is wrong", where="a:1", hint="mend it"), PlanError(["one", "two"], where="run.yaml")]
)
def test_errors_can_be_sent(error: SpecForgeError) -> None:
    here, there = multiprocessing.Pipe()
    here.send(error)
    received = there.recv()
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert (received.message, received.where, received.hint) == (error.message, error.where, error.hint)


def test_what_workers_warn_of_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_rows(tmp_path / "a.jsonl", [talk("good")] * 200)
    prepare([source], tmp_path / "set", workers=2, tokenizer=Armed(wary=True))
    assert [record.getMessage() for record in caplog.records] == ["this tokenizer is armed"]
