# SPDX-License-Identifier: Apache-2.0
"""Data sets of the hub: which files are fetched, from which commit, and what happens where the hub is not to be had."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hub_service import COMMIT, NAME, hub
from pyarrow import parquet
from specforge_core.config.run_config import HubSource
from specforge_core.contracts import DataError
from specforge_core.prompts.reading.hub import choose_files

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def table(*ids: str) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"id": given, "messages": TALK} for given in ids]), out)
    return out.getvalue()


def lines(*ids: str) -> bytes:
    return "".join(json.dumps({"id": given, "messages": TALK}) + "\n" for given in ids).encode()


FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Talks\n",
    "talks.py": b"raise SystemExit('ran')",
    "data/train-00000-of-00002.parquet": table("a", "b"),
    "data/train-00001-of-00002.parquet": table("c"),
    "data/test-00000-of-00001.parquet": table("t"),
}

READ = """
import json, sys
from specforge_core.config.run_config import HubSource
from specforge_core.contracts import DataError
from specforge_core.prompts.reading.rows import read_rows
from specforge_core.prompts.reading.sources import find_files
source = HubSource.model_validate_json(sys.argv[1])
try:
    files = find_files([source])
    rows = [[row.prompt_id, row.where] for row in read_rows(files)]
    print(json.dumps({"rows": rows, "origin": dict(files[0].origin), "labels": [file.label for file in files]}))
except DataError as error:
    print(json.dumps({"error": str(error)}))
"""


def read(address: str, cache: Path, *, offline: str = "0", **source: Any) -> dict[str, Any]:
    """In a process of its own: the hub's package reads its settings when it is imported."""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": offline}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps({"hub": NAME, **source})],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {"err": done.stderr}


def test_the_files_of_a_split_are_fetched_once_and_read_without_the_hub_afterwards(tmp_path: Path) -> None:
    with hub(FILES) as (address, asked):
        found = read(address, tmp_path)
        assert found["rows"] == [
            ["a", f"{NAME}/data/train-00000-of-00002.parquet:1"],
            ["b", f"{NAME}/data/train-00000-of-00002.parquet:2"],
            ["c", f"{NAME}/data/train-00001-of-00002.parquet:1"],
        ]
        assert found["origin"] == {"hub": NAME, "revision": COMMIT, "split": "train", "config": ""}
        assert found["labels"] == ["talks-train-00000-of-00002", "talks-train-00001-of-00002"]
        fetched = {path.rpartition("/")[2] for path in asked if path.startswith("GET /datasets/")}
        assert fetched == {"README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"}
    for offline in ("0", "1"):
        again = read(address, tmp_path, offline=offline)
        assert (again["rows"], again["origin"]) == (found["rows"], found["origin"])
        assert "cannot be reached; what was fetched before is used" in again["err"]
    missing = read(address, tmp_path, split="test")
    assert "data/test-00000-of-00001.parquet was not fetched" in missing["error"]


def test_a_revision_is_kept_to_and_recorded(tmp_path: Path) -> None:
    with hub(FILES) as (address, _):
        assert read(address, tmp_path, revision="v1", split="test")["origin"]["revision"] == COMMIT
        gone = read(address, tmp_path, revision="v9")["error"]
    assert "the hub has no such data set or revision, or not for you (status 404)" in gone
    assert "hf auth login" in gone


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_so(tmp_path: Path) -> None:
    with hub({}) as (address, _):
        pass
    error = read(address, tmp_path)["error"]
    assert error.startswith(f"{NAME}: cannot be had from the hub: ")
    assert "name the folder instead" in error


def test_the_card_says_which_files_are_which(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: s/*.jsonl\n"
    card += "- config_name: large\n  default: true\n  data_files: l/*\n---\n"
    files = {"README.md": card.encode(), "s/test.jsonl": lines("s"), "l/x.jsonl": lines("l")}
    with hub(files) as (address, _):
        assert read(address, tmp_path)["rows"] == [["l", f"{NAME}/l/x.jsonl:1"]]
        assert read(address, tmp_path, config="small")["rows"] == [["s", f"{NAME}/s/test.jsonl:1"]]
        assert "has no configuration 'tiny' (it has small, large)" in read(address, tmp_path, config="tiny")["error"]


def source(**values: Any) -> HubSource:
    return HubSource(hub=NAME, **values)


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["a.jsonl", "b.jsonl"], {}, ["a.jsonl", "b.jsonl"]),
        (["train.jsonl", "valid.jsonl"], {}, ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl"], {"split": "validation"}, ["valid.jsonl"]),
        (["en/train/0.parquet", "de/train/0.parquet"], {"config": "de"}, ["de/train/0.parquet"]),
        (["data/train_sft-0.parquet", "data/test_sft-0.parquet"], {}, ["data/train_sft-0.parquet"]),
        (["training/x.json", "trainer.json"], {}, ["training/x.json"]),
    ],
)
def test_without_a_card_names_tell_the_split(names: list[str], wanted: dict[str, str], chosen: list[str]) -> None:
    assert choose_files(names, [], source(**wanted)) == chosen


@pytest.mark.parametrize(
    ("names", "configs", "wanted", "message"),
    [
        ([], [], {}, "has no data files of split 'train'"),
        (["a.jsonl"], [], {"split": "test"}, "has no data files of split 'test'.*a.jsonl"),
        (["a.jsonl"], [{"data_files": 3}], {}, "has no data files of split 'train'"),
        (["a"], [{"config_name": "x", "data_files": "a"}, {"config_name": "y", "data_files": "a"}], {}, "config: x"),
    ],
)
def test_no_files_are_an_error_that_lists_what_there_is(
    names: list[str], configs: list[Any], wanted: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        choose_files(names, configs, source(**wanted))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from specforge_core.prompts.reading.sources import find_files

    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(DataError, match=r"needs? the huggingface_hub package .*specforge-core\[datasets\]"):
        find_files([source()])
