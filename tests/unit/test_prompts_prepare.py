# SPDX-License-Identifier: Apache-2.0
"""From files as users have them to prompt sets on disk: formats, ids, caching, and every way the data can be wrong."""

from __future__ import annotations

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, DeadlineExceeded, Prompt, SilentProgress
from specforge_core.prompts.directory_lock import locked
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_set import PromptSet, write_prompt_set
from specforge_core.prompts.rows import read_rows
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.tokenizer import load_tokenizer

TOKENS = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the draft"}]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def no_tokenizer():
    raise AssertionError("the tokenizer was asked for")


def prepare(sources: list[Path], directory: Path, *, tokenizer=no_tokenizer, vocab_size: int = 100, **settings):
    section = DataSection(train=sources, **{"max_length": 64, **settings})
    return prepare_prompts(
        sources,
        directory=directory,
        tokenizer=tokenizer,
        settings=section,
        vocab_size=vocab_size,
        progress=SilentProgress(),
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
    with pytest.raises(DataError, match="not a dataset on disk"):
        list(read_rows([tmp_path]))


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
    "no known key": ({"text": "a"}, "x.jsonl:2: has none of messages, conversations, input_ids; its keys are text"),
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
    "tool calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool calls are not"),
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


def test_waiting_for_another_preparation_ends_at_the_deadline(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "set", progress=SilentProgress()),
        pytest.raises(DeadlineExceeded, match="another process that prepares"),
        locked(tmp_path / "set", progress=SilentProgress(), deadline_seconds=0.2),
    ):
        pass
    with locked(tmp_path / "set", progress=SilentProgress()):
        pass
