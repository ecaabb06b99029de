# SPDX-License-Identifier: Apache-2.0
"""From files as users have them to prompt sets on disk: formats, ids, caching, and every way the data can be wrong."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, DeadlineExceeded, Prompt, RunStopped, SilentProgress, StopSignal
from specforge_core.prompts import prepare as preparation
from specforge_core.prompts.directory_lock import locked
from specforge_core.prompts.id_table import IdTable
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_set import PromptSet, write_prompt_set
from specforge_core.prompts.report import describe_lengths
from specforge_core.run.interrupt import StoppableProgress
from specforge_core.testing.tiny_tokenizer import TinyTokenizer
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.tokenizer import load_tokenizer

TOKENS = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the draft"}]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def no_tokenizer():
    raise AssertionError("the tokenizer was asked for")


def prepare(
    sources: list[Path], directory: Path, *, tokenizer=no_tokenizer, vocab_size: int = 100, progress=None, **settings
):
    section = DataSection(train=sources, **{"max_length": 64, **settings})
    return prepare_prompts(
        sources,
        directory=directory,
        tokenizer=tokenizer,
        settings=section,
        vocab_size=vocab_size,
        progress=progress or SilentProgress(),
    )


def test_all_formats_in_one_run(tiny_model, tmp_path: Path) -> None:
    share = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "the draft"}]
    rows = [{"messages": TALK}, {"conversations": share, "id": "given.1"}, {**TOKENS, "id": "../unsafe"}]
    source = write_lines(tmp_path / "my data.jsonl", rows[0], "", rows[1], rows[2])
    prompts = prepare(
        [source],
        tmp_path / "set",
        tokenizer=lambda: load_tokenizer(HfTargetConfig(name="hf", path=str(tiny_model.path))),
        vocab_size=tiny_model.vocab_size,
    )
    assert [prompt.prompt_id for prompt in prompts] == ["my-data-00000", "given.1", "my-data-00002"]
    assert prompts[0].input_ids == prompts[1].input_ids
    assert sum(prompts[0].loss_mask) > 1
    assert prompts[2] == prompts[-1] == Prompt("my-data-00002", [5, 6, 7, 8], [0, 0, 1, 1])
    assert prompts[1:] == [prompts[1], prompts[2]]


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list([{**TOKENS, "messages": None}, {**TOKENS, "messages": None}])
    split.save_to_disk(tmp_path / "alpaca")
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    assert [p.prompt_id for p in prepare([tmp_path / "alpaca"], tmp_path / "set")] == ["alpaca-00000", "alpaca-00001"]
    assert len(prepare([tmp_path / "both" / "train"], tmp_path / "set2")) == 2
    with pytest.raises(DataError, match=r"several splits: test, train .*both/test"):
        prepare([tmp_path / "both"], tmp_path / "set3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data file|not a dataset on disk"):
        prepare([tmp_path / "empty"], tmp_path / "set4")


def test_prompts_that_train_nothing_are_dropped_and_counted_and_long_ones_cut(tmp_path: Path) -> None:
    long = {"input_ids": list(range(80)), "loss_mask": [0] * 70 + [1] * 10}
    half = {"input_ids": list(range(80)), "loss_mask": [0] * 60 + [1] * 20}
    source = write_lines(tmp_path / "a.jsonl", long, TOKENS, {**TOKENS, "loss_mask": [0] * 4}, half)
    prompts = prepare([source], tmp_path / "set")
    assert (len(prompts), prompts.dropped, [p.prompt_id for p in prompts]) == (2, 2, ["a-00001", "a-00003"])
    assert (prompts[1].num_tokens, sum(prompts[1].loss_mask)) == (64, 4)
    assert len(prepare([source], tmp_path / "set", max_prompts=1)) == 1


def test_a_line_without_end_is_refused_before_the_rest_is_read(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", TOKENS, TOKENS)
    os.truncate(source, 1 << 40)  # a terabyte of nothing takes no room, and half an hour to read
    with pytest.raises(DataError, match=r"a\.jsonl:3: is longer than"):
        prepare([source], tmp_path / "set")


def test_reopening_is_instant_and_follows_contents_and_settings(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", TOKENS, TOKENS)
    first = prepare([source], tmp_path / "set")
    written = (tmp_path / "set" / "manifest.json").stat().st_ino
    assert prepare([source], tmp_path / "set").fingerprint == first.fingerprint
    os.utime(source, (1, 1))  # touched, not changed
    assert prepare([source], tmp_path / "set").fingerprint == first.fingerprint
    assert (tmp_path / "set" / "manifest.json").stat().st_ino == written
    shorter = prepare([source], tmp_path / "set", max_length=3)
    assert shorter.fingerprint != first.fingerprint
    assert shorter[0].num_tokens == 3
    assert first[0].num_tokens == 4, "a set that is open stays readable"
    write_lines(source, TOKENS)
    assert len(prepare([source], tmp_path / "set")) == 1
    copy = write_lines(tmp_path / "elsewhere.jsonl", TOKENS).rename(tmp_path / "set2-a.jsonl")
    assert len(prepare([copy], tmp_path / "set2")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".set.lock",
        ".set2.lock",
        "a.jsonl",
        "set",
        "set2",
        "set2-a.jsonl",
    ]


def test_another_tokenizer_prepares_anew(tiny_model, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"messages": TALK})
    calls = []

    class Renamed:
        def __init__(self, fingerprint: str):
            self.inner = load_tokenizer(HfTargetConfig(name="hf", path=str(tiny_model.path)))
            self.fingerprint = fingerprint
            calls.append(fingerprint)

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

    def run(fingerprint: str) -> PromptSet:
        return prepare([source], tmp_path / "set", tokenizer=lambda: Renamed(fingerprint), vocab_size=400)

    assert run("one").fingerprint == run("one").fingerprint != run("two").fingerprint


def test_ids_are_unique_over_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    sources = [write_lines(tmp_path / "x.jsonl", TOKENS), write_lines(tmp_path / "b" / "x.jsonl", TOKENS)]
    assert [p.prompt_id for p in prepare(sources, tmp_path / "set")] == ["x-00000", "x.2-00000"]


def test_token_counts_are_of_trained_positions(tmp_path: Path) -> None:
    prompts = [Prompt("a", [1, 2, 2, 3], [1, 1, 1, 0]), Prompt("b", [2, 0, 4], [0, 1, 1])]
    saved = write_prompt_set(tmp_path / "set", iter(prompts), fingerprint="f", dropped=3)
    assert list(saved) == prompts
    assert saved.token_counts(6).tolist() == [1, 1, 2, 0, 1, 0]
    assert saved.token_counts(6).dtype == torch.int64
    assert (saved.dropped, saved.fingerprint, saved.prompt_id(-1)) == (3, "f", "b")
    with pytest.raises(DataError, match="vocabulary mismatch"):
        saved.token_counts(4)
    with pytest.raises(IndexError):
        saved[2]


ROWS = {
    "not JSON": ("{", "x.jsonl:2: is not JSON"),
    "a list": ([1], "x.jsonl:2: is a JSON list"),
    "no known key": ({"text": "a"}, "x.jsonl:2: has none of messages, conversations, prompt with completion"),
    "no mask": ({"input_ids": [1]}, "x.jsonl:2: loss_mask: is missing"),
    "odd mask": ({"input_ids": [1], "loss_mask": [2]}, "x.jsonl:2: loss_mask: is missing or not a list of 0 and 1"),
    "short mask": ({"input_ids": [1, 2], "loss_mask": [1]}, "x.jsonl:2: loss_mask: has 1 entries, input_ids 2"),
    "text for ids": ({"input_ids": ["a"], "loss_mask": [1]}, "x.jsonl:2: input_ids: is not a list of token ids"),
    "negative id": ({"input_ids": [-1], "loss_mask": [1]}, "x.jsonl:2: input_ids: is not a list of token ids"),
    "no turns": ({"messages": []}, "x.jsonl:2: messages: is not a list of turns, or empty"),
    "turn is text": ({"messages": ["hi"]}, "x.jsonl:2: messages[0]: is a str"),
    "no role": ({"messages": [{"content": "hi"}]}, "x.jsonl:2: messages[0]: names no role"),
    "odd role": ({"messages": [{"role": "usr", "content": "hi"}]}, "messages[0].role: unknown role 'usr'"),
    "no content": ({"messages": [TALK[0], {"role": "assistant"}]}, "messages[1].content: is missing or not text"),
    "ShareGPT without value": ({"conversations": [{"from": "human"}]}, "conversations[0].value: is missing"),
    "half a surrogate": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content: holds half"),
    "tool call": ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]: is a int"),
    "same id": ({**TOKENS, "id": "first"}, "x.jsonl:2: id 'first' is also that of"),
    "vocabulary": ({**TOKENS, "input_ids": [1, 2, 3, 100]}, "x.jsonl:2: vocabulary mismatch: token id 100 in sample x"),
}


@pytest.mark.parametrize("case", list(ROWS))
def test_a_malformed_line_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    row, message = ROWS[case]
    source = write_lines(tmp_path / "x.jsonl", {**TOKENS, "id": "first"}, row)
    with pytest.raises(DataError) as caught:
        prepare([source], tmp_path / "set")
    assert message in str(caught.value)
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.lock", "x.jsonl"], "nothing is left behind"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "holds no prompts"),
        ("\n \n", "holds no prompts"),
        (json.dumps({**TOKENS, "loss_mask": [0] * 4}), "no prompt has a trained token: 1 dropped"),
        (b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_data_that_give_nothing_are_an_error(content: str | bytes | None, message: str, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prepare([source], tmp_path / "set")


def test_damaged_sets_are_refused_and_prepared_anew(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", TOKENS, TOKENS)
    prepare([source], tmp_path / "set")
    mask = tmp_path / "set" / "loss_mask.u8"
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"loss_mask\.u8 is missing or not 8 bytes"):
        PromptSet.open(tmp_path / "set")
    assert len(prepare([source], tmp_path / "set")) == 2
    with pytest.raises(DataError, match="no prepared prompts"):
        PromptSet.open(tmp_path)
    with pytest.raises(DataError, match="holds other files"):
        prepare([source], tmp_path)


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *[TOKENS] * 2000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(DataError, match="cannot be written: File too large"):
            prepare([source], tmp_path / "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.lock", "a.jsonl"]
    with pytest.raises(DataError, match="cannot be written: "):
        prepare([source], source / "set")


def test_two_preparations_at_once_do_the_work_once(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", *[TOKENS] * 50)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(prepare, [source], tmp_path / "set") for _ in range(8)]
        sets = [future.result(timeout=60) for future in futures]
    assert [len(prompts) for prompts in sets] == [50] * 8
    assert len({prompts.manifest["fingerprint"] for prompts in sets}) == 1


HOLDER = """
import sys, time
from pathlib import Path
from specforge_core.contracts import SilentProgress
from specforge_core.prompts.directory_lock import locked
with locked(Path(sys.argv[1]), progress=SilentProgress()) as holder:
    holder.rows, holder.total = 7, 9
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def held_elsewhere(directory: Path, *, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Another process prepares there."""
    command = [sys.executable, "-c", HOLDER, str(directory), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


class Waiting(SilentProgress):
    """What was waited for."""

    def __init__(self) -> None:
        self.reasons: list[str | None] = []

    def waiting(self, reason: str | None) -> None:
        self.reasons.append(reason)


def test_another_preparation_that_shows_life_is_waited_for(tmp_path: Path) -> None:
    progress = Waiting()
    with (
        held_elsewhere(tmp_path / "set", seconds=4),
        locked(tmp_path / "set", progress=progress, deadline_seconds=2.5),
    ):
        assert progress.reasons[-1] is None
    assert "another process that prepares the same prompts: 7 rows of 9" in progress.reasons


def test_another_preparation_that_is_stopped_is_given_up(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "set", seconds=600) as process:
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with (
            pytest.raises(DeadlineExceeded, match=f"no life for 1 s .*continue or end process {process.pid}"),
            locked(tmp_path / "set", progress=SilentProgress(), deadline_seconds=1),
        ):
            pass
        assert time.monotonic() - began < 5
        process.kill()
        process.wait(10)
        with locked(tmp_path / "set", progress=SilentProgress()):
            pass


def test_rows_that_cannot_be_used_are_skipped_counted_and_kept(tmp_path: Path) -> None:
    bad = [row for row, _ in ROWS.values()]
    source = write_lines(tmp_path / "x.jsonl", {**TOKENS, "id": "first"}, *bad, TOKENS)
    prompts = prepare([source], tmp_path / "set", on_bad_row="skip", workers=2)
    assert [prompt.prompt_id for prompt in prompts] == ["first", f"x-{len(bad) + 1:05d}"]
    [report] = prompts.report
    assert (report["rows"], report["samples"], sum(report["rejected"].values())) == (len(bad) + 2, 2, len(bad))
    assert report["rejected"]["has … entries, input_ids …"] == 1
    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in rejects] == list(range(2, len(bad) + 2))
    for entry, (_, message) in zip(rejects, ROWS.values(), strict=True):
        where = entry["where"].replace("x.jsonl:" + str(entry["row"]), "x.jsonl:2")
        assert message in f"{where}: {entry['reason']}"
        assert entry["hint"]
        assert entry["source"] == str(source)


def test_too_many_rows_that_cannot_be_used_end_the_run(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", TOKENS, "{", TOKENS, "[1]", TOKENS, "nothing")
    assert len(prepare([source], tmp_path / "set", on_bad_row="skip", max_bad_rows=3)) == 3
    with pytest.raises(DataError, match=r"x\.jsonl:6: 3 rows cannot be used, data\.max_bad_rows allows 2; the last"):
        prepare([source], tmp_path / "two", on_bad_row="skip", max_bad_rows=2)
    assert not (tmp_path / "two").exists()
    with pytest.raises(DataError, match="no prompt has a trained token: 0 dropped, 1 rows could not be used"):
        prepare([write_lines(tmp_path / "y.jsonl", "{")], tmp_path / "three", on_bad_row="skip")


def test_what_was_served_may_end_before_the_template_does(tmp_path: Path) -> None:
    ids = TinyTokenizer().encode("<|bos|><|turn|>user\nhi<|end|><|turn|>assistant\nthe draft<|end|>").input_ids
    served = [{"input_ids": part, "loss_mask": [1] * len(part)} for part in (ids, ids[:-1], ids[:-3])]
    rows = [{**row, "messages": TALK, "regeneration": {"ending": "cut"}} for row in served]
    rows.append({"input_ids": [*ids[:-1], 7], "loss_mask": [1] * len(ids), "messages": TALK})
    [report] = prepare_tiny(write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "set").report
    assert (report["counts"], report["unused"]) == ({"reencoded_alike": 3, "reencoded_otherwise": 1}, {})


def test_no_rejects_no_file(tmp_path: Path) -> None:
    prepare([write_lines(tmp_path / "a.jsonl", TOKENS)], tmp_path / "set", on_bad_row="skip")
    assert not (tmp_path / "set" / "rejects.jsonl").exists()


def prepare_tiny(source: Path, directory: Path, **settings: object) -> PromptSet:
    return prepare([source], directory, tokenizer=TinyTokenizer, vocab_size=260, **settings)


def test_what_was_counted_is_kept(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "mood": "odd"}, {"messages": [*TALK, *TALK]}, {**TOKENS, "messages": TALK}]
    source = write_lines(tmp_path / "a.jsonl", *rows, {**TOKENS, "loss_mask": [0] * 4})
    [report] = prepare_tiny(source, tmp_path / "set", max_length=30).report
    encoded = TinyTokenizer().encode("<|bos|><|turn|>user\nhi<|end|><|turn|>assistant\nthe draft<|end|>")
    assert (report["rows"], report["samples"], report["dropped"], report["rejected"]) == (4, 3, 1, {})
    assert report["tokens"] == 2 * 30 + 4
    assert len(encoded.input_ids) == 31
    assert report["counts"] == {"answers_trained": 3, "cut": 2, "reencoded_otherwise": 1}
    assert report["unused"] == {"mood": 1}
    assert report["lengths"] == {"p50": 30, "p90": 30, "p99": 30, "max": 30}


def test_one_sample_for_each_turn(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"messages": [*TALK, *TALK], "id": "x"}, {"messages": TALK})
    prompts = prepare_tiny(source, tmp_path / "set", samples="turn", max_length=99)
    assert [prompt.prompt_id for prompt in prompts] == ["x.1", "x.2", "a-00001.1"]
    assert prompts[0].input_ids == prompts[2].input_ids
    assert prompts[0].num_tokens < prompts[1].num_tokens
    first = prepare_tiny(source, tmp_path / "two", samples="turn", max_length=99, max_prompts=1)
    assert [prompt.prompt_id for prompt in first] == ["x.1"]


def test_text_and_its_spans(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"text": "ask answer", "spans": [[4, 10]]})
    [prompt] = prepare_tiny(source, tmp_path / "set")
    assert prompt.input_ids == list(b"ask answer")
    assert prompt.loss_mask == [0] * 4 + [1] * 6


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 50},
        {"samples": "turn"},
        {"last_turn_only": True},
        {"max_prompts": 1},
        {"template_arguments": {"enable_thinking": False}},
        {"date": "2025-05-05"},
        {"mapping": {"tools": "apis"}},
        {"on_bad_row": "skip"},
        {"max_bad_rows": 5},
    ],
    ids=str,
)
def test_every_setting_that_makes_prompts_is_in_the_fingerprint(tmp_path: Path, change: dict[str, object]) -> None:
    source = write_lines(tmp_path / "a.jsonl", TOKENS)
    assert prepare([source], tmp_path / "set").fingerprint != prepare([source], tmp_path / "set", **change).fingerprint


def test_the_number_of_workers_is_not_in_the_fingerprint(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", TOKENS)
    first = prepare([source], tmp_path / "set")
    assert prepare([source], tmp_path / "set", workers=2).fingerprint == first.fingerprint


def test_an_error_that_ends_reading_waits_for_its_turn(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", TOKENS, TOKENS)
    (tmp_path / "b.jsonl").write_text("")
    assert len(prepare([good, tmp_path / "b.jsonl"], tmp_path / "set", max_prompts=2, workers=2)) == 2
    with pytest.raises(DataError, match=r"b\.jsonl: holds no prompts"):
        prepare([good, tmp_path / "b.jsonl"], tmp_path / "set", max_prompts=3)
    assert len(PromptSet.open(tmp_path / "set")) == 2


def test_ids_of_one_hash_are_told_apart() -> None:
    written: list[bytes] = []
    table = IdTable(written.__getitem__)
    for number in range(5000):
        prompt_id = b"id-%d" % number
        assert table.find(prompt_id) is None
        table.add(prompt_id)
        written.append(prompt_id)
    assert [table.find(prompt_id) for prompt_id in written] == list(range(5000))
    written[17] = b"another of this hash"
    assert table.find(b"id-17") is None


def test_percentiles_are_by_nearest_rank() -> None:
    assert describe_lengths(range(1, 101)) == {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert describe_lengths([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    assert describe_lengths([3, 1, 2]) == {"p50": 2, "p90": 3, "p99": 3, "max": 3}
    assert describe_lengths([]) == {}


def test_a_stop_is_heeded_and_what_was_prepared_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(tmp_path / "a.jsonl", *[TOKENS] * 500)
    stop = StopSignal()
    monkeypatch.setattr(preparation, "SAVE_SECONDS", 0.0)

    class Stopping(SilentProgress):
        def advance(self, units: int, **values: float) -> None:
            if units:
                stop.request("enough")

    with pytest.raises(RunStopped, match="enough"):
        prepare([source], tmp_path / "set", progress=StoppableProgress(Stopping(), stop))
    assert (tmp_path / ".set.partial" / "progress.json").exists()
    assert len(prepare([source], tmp_path / "set")) == 500
    assert not (tmp_path / ".set.partial").exists()
