# SPDX-License-Identifier: Apache-2.0
"""Run files: what is accepted, and that every error names the file, the key and the line."""

from __future__ import annotations

from pathlib import Path

import pytest
from specforge_core.config.load import LoadedConfig, load_run_config
from specforge_core.contracts import ConfigError

GOOD = """\
run:
  directory: runs/x
target: {name: some}
strategy: {name: other, setting: 3}
data:
  train: [a.jsonl]
training:
  learning_rate: 1e-4
"""


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> LoadedConfig:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_run_config(path, overrides)


def test_good_file_is_read_and_keeps_plugin_sections_as_they_are(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.config.training.learning_rate == 1e-4
    assert loaded.config.strategy == {"name": "other", "setting": 3}
    assert loaded.locate(("data", "train")).endswith("run.yaml: data.train (line 6)")


def test_relative_paths_stay_relative_to_the_working_directory(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD).config.data.train == [Path("a.jsonl")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("just text", "holds a str"),
        ("- a\n- b\n", "holds a list"),
        ("run: [\n", "not valid YAML"),
        ("run: {directory: x}\nrun: {directory: y}\n", r"line 2\): key 'run' stands twice, first in line 1"),
        ("data:\n  train: [a]\n  train: [b]\n", r"line 3\): key 'train' stands twice"),
        ("run: &a\n  self: *a\n", "an alias contains itself"),
        (b"run: \xff\xfe", "not UTF-8"),
        ("[" * 5000, "nested too deeply"),
        ("run: !!python/object:os.system {}\n", "not valid YAML"),
        ("run: 2020-99-99\n", "not valid YAML"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert "run.yaml" in caught.value.where


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run file"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_run_config(tmp_path)


@pytest.mark.parametrize(
    ("addition", "where", "message"),
    [
        ("  global_batch_sizee: 3\n", "training.global_batch_sizee (line 9)", "did you mean 'global_batch_size'"),
        ("trainin: {}\n", "trainin (line 9)", "unknown section 'trainin'; did you mean 'training'"),
        ("epochs: 3\n", "epochs (line 9)", "did you mean 'training.epochs'"),
        ("  epochs: many\n", "training.epochs (line 9)", "valid integer"),
        ("store: memory\n", "store (line 9)", "like store: {name: memory}"),
        ("topology: sideways\n", "topology (line 9)", "'offline', 'colocated'"),
        ("1: 2\n", "line 9", "string"),
    ],
)
def test_a_wrong_key_or_value_is_located(tmp_path: Path, addition: str, where: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + addition)
    assert where in caught.value.where
    assert message in caught.value.message


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace("  train: [a.jsonl]", "  train: a.jsonl") + "  epochs: 0\nsore: {}\n")
    message = str(caught.value)
    assert "3 problems" in message
    for part in ("data.train (line 6): must be a list", "training.epochs (line 9)", "sore (line 10)"):
        assert part in message


def test_missing_sections_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)data: is missing.*|target: is missing.*"):
        load(tmp_path, "run: {directory: x}\nstrategy: {name: a}\n")


def test_overrides_change_values_and_add_sections(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD, "training.epochs=3", "store.name=memory", "data.train=[b, c]", "strategy.setting=")
    assert loaded.config.training.epochs == 3
    assert loaded.config.store == {"name": "memory"}
    assert loaded.config.data.train == [Path("b"), Path("c")]
    assert loaded.config.strategy["setting"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "is not section.key=value"),
        ("=3", "is not section.key=value"),
        ("training..epochs=3", "is not section.key=value"),
        ("training.epochs=[", "not valid YAML"),
        ("training.epochs=x", "valid integer"),
        ("trainin.epochs=3", "did you mean 'training'"),
        ("training.epoch=3", "did you mean 'epochs'"),
        ("run.directory.x=3", "run.directory holds a value"),
    ],
)
def test_a_wrong_override_is_quoted(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, override)
    assert caught.value.where == f"override {override!r}"
    assert message in caught.value.message
