# SPDX-License-Identifier: Apache-2.0
"""Run files: what is accepted, and that every error names the file, the key and the line."""

from __future__ import annotations

import time
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
        ("  threads: 1000000\n", "training.threads (line 9)", "less than or equal to 1024"),
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


def bomb(levels: int = 10, width: int = 10) -> str:
    """YAML of a few hundred bytes whose last anchor stands for width ** levels words."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


LARGE = bomb()
MERGES = "m0: &m0 {k: v}\n" + "".join(
    f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 10)}]\n  k{n}: v\n" for n in range(1, 11)
)
LONG_TEXT = f"t: &t '{'x' * 100_000}'\nl: [{', '.join(['*t'] * 100_000)}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LARGE + "training: {epochs: *a10}\n", "aliases stand for more than"),
        (LARGE + "strategy: {name: x, deep: {er: [*a10]}}\n", "aliases stand for more than"),
        (LARGE + "topology: *a10\n", "aliases stand for more than"),
        (bomb(3) + "? *a3\n: 1\n", "where a key belongs"),
        (MERGES + "run:\n  <<: *m10\n", "aliases stand for more than"),
        (LONG_TEXT, "aliases stand for more than"),
        ("? [a, b]\n: 1\n", "where a key belongs"),
        ("a: {? {b: c} : 1}\n", "where a key belongs"),
        ("run: 2024-01-01\n", "a date"),
        ("run: 2024-01-01 10:00:00\n", "a date"),
        ("run: !!binary aGVsbG8=\n", "not read here"),
        ("run: !!set {a, b}\n", "not read here"),
        ("run: !!omap [a: 1]\n", "not read here"),
        ("run: !!pairs [a: 1]\n", "not read here"),
        ("run: !mine {a: 1}\n", "not read here"),
        ("run: !!int x\n", "it is no int"),
        ("run: !!int ''\n", "it is no int"),
        ("run: !!float x\n", "it is no float"),
        ("run: !!bool x\n", "it is no bool"),
        (f"run: {'9' * 100_000}\n", "beyond 64 bits"),
        (f"run: 0x{'f' * 100_000}\n", "beyond 64 bits"),
        ("run: 9223372036854775808\n", "beyond 64 bits"),
        (f"run: {'1:' * 200_000}1\n", "beyond 64 bits"),
        ("true: 1\n", "key true is not a string"),
        ("run: {null: 1}\n", "key null is not a string"),
        ('run: "a\\0b"\n', r"control character \(U\+0000\)"),
        ('run: "\\e[2J"\n', r"control character \(U\+001B\)"),
        ('run: "\\ud800"\n', r"control character \(U\+D800\)"),
        ('run: "\\UFFFFFFFF"\n', "not valid YAML"),
        ('run: "\\U00110000"\n', "not valid YAML"),
        ('"\\x07": 1\n', r"control character \(U\+0007\)"),
        ("a: [" + ", ".join(["x"] * 600_000) + "]\n", "is longer than 1048576 bytes"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000)), "nested too deeply"),
    ],
)
def test_hostile_yaml_is_refused_at_once(tmp_path: Path, text: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert time.monotonic() - began < 15
    assert len(str(caught.value)) < 1000
    assert "run.yaml" in caught.value.where


@pytest.mark.parametrize("value", ["[" * 5000, "!!binary aGk=", "9" * 5000, '"\\0"', "{[a]: b}", "2024-01-01"])
def test_hostile_overrides_are_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, f"training.epochs={value}")
    assert len(str(caught.value)) < 1000


def test_a_bomb_in_an_override_is_refused(tmp_path: Path) -> None:
    flow = "[" + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)) + "]"
    with pytest.raises(ConfigError, match="aliases stand for more than"):
        load(tmp_path, GOOD, "strategy.x=" + flow.replace("*a0", "x"))


def test_honest_aliases_are_spelt_out(tmp_path: Path) -> None:
    text = GOOD.replace("[a.jsonl]", "&files [a.jsonl]\n  eval: *files") + "evaluation: &e {every_steps: 2}\n"
    config = load(tmp_path, text + "bench:\n  <<: {prompts: 3}\n").config
    assert (config.data.eval, config.bench.prompts) == ([Path("a.jsonl")], 3)


def test_a_value_is_shown_short(tmp_path: Path) -> None:
    many = ", ".join(["x"] * 10_000)
    for setting in (f"epochs: [{many}]", f"epochs: '{'y' * 9999}'", f"epochs: {{a: [{many}]}}"):
        with pytest.raises(ConfigError) as caught:
            load(tmp_path, GOOD + f"  {setting}\n")
        assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "text",
    [
        "channel: {name: redis, url: 'redis://:wonderful-secret@h'}\ntraining: *wonderful\n",
        "channel: redis://:wonderful-secret@h\n",
        "redis://:wonderful-secret@h: 1\n",
        "topology: redis://:wonderful-secret@h\n",
        "run: {directory: x, password: wonderful-secret}\n",
        "bench: {password: wonderful-secret}\n",
        "bench: [{password: wonderful-secret}]\n",
        "data: {train: {secret: wonderful-secret}}\n",
        "channel: !redis://:wonderful-secret@h {}\n",
        "channel: {url: 'redis://:wonderful-secret@h'\n",
    ],
)
def test_no_message_about_a_run_file_tells_a_secret(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "wonderful-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "channel=redis://:wonderful-secret@h",
        "channel.url.x=redis://:wonderful-secret@h",
        "channel.password=wonderful-secret",
        "bench.password=wonderful-secret",
        "bench={password: wonderful-secret}",
        "channel.url=[redis://:wonderful-secret@h",
        "redis://:wonderful-secret@h",
        "topology=redis://:wonderful-secret@h",
        "bench.prompts={password: 'wonderful-secret",
    ],
)
def test_no_message_about_an_override_tells_a_secret(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace("target:", "channel: {name: x, url: y}\ntarget:"), override, "topology=other")
    assert "wonderful-secret" not in str(caught.value)


def test_data_are_paths_and_hub_data_sets(tmp_path: Path) -> None:
    text = GOOD.replace("[a.jsonl]", "[a.jsonl, {hub: org/name, revision: v1}]")
    path, hub = load(tmp_path, text).config.data.train
    assert path == Path("a.jsonl")
    assert (hub.hub, hub.revision, hub.split, hub.config) == ("org/name", "v1", "train", None)
    with pytest.raises(ConfigError, match=r"data\.train\.1\.revison \(line 6\): unknown key 'revison'; did you mean"):
        load(tmp_path, text.replace("revision", "revison"))
