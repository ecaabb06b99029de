# SPDX-License-Identifier: Apache-2.0
"""A run directory that somebody hands over decides nothing that its receiver would not: it is data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from specforge_core.config.plan import Plan, compose
from specforge_core.contracts import ConfigError, PlanError, SpecForgeError
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.run.directory import to_yaml, write_text
from specforge_core.run.own_runs import load_run, mark_as_own
from tiny_model import TinyModel


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "specforge" / "key"


def make_run(tiny_model: TinyModel, root: Path, **changes: Mapping[str, object]) -> Path:
    """What a run leaves behind that is needed to start from it."""
    values: dict[str, dict[str, object]] = {
        "run": {"directory": str(root)},
        "target": {"name": "hf", "path": str(tiny_model.path)},
        "strategy": {"name": "eagle3"},
        "data": {"train": [str(tiny_model.train)], "max_length": 64},
    }
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings}
    write_text(root / "config.yaml", mark_as_own(to_yaml(values), root))
    write_text(root / "provenance.json", "{}")
    return root


def plan(run: Path, *overrides: str) -> Plan:
    return compose(load_run(run, overrides), PluginRegistry.discover())


WIDENING: dict[str, tuple[str, object]] = {
    "target.trust_remote_code": ("run Python code", True),
    "target.attn_implementation": ("code from the hub", "kernels-community/any"),
    "target.path": ("fetch", "somebody/model"),
    "run.token_file": ("use the secret in", "/etc/hostname"),
    "data.train": ("connect to the hub and download org/talks", [{"hub": "org/talks"}]),
    "data.eval": ("connect to the hub and download org/talks", ["a.jsonl", {"hub": "org/talks"}]),
    "data.features": ("keep its features in", "/var/elsewhere"),
    "store.path": ("keep its features in", "/var/elsewhere"),
    "channel.path": ("keep its refs in", "/var/elsewhere"),
}


@pytest.mark.parametrize("key", list(WIDENING))
def test_what_widens_trust_is_asked_for_again(tiny_model, tmp_path, state, key: str) -> None:
    what, value = WIDENING[key]
    section, name = key.split(".")
    part = {"name": "file"} if section in ("store", "channel") else {}
    run = make_run(tiny_model, tmp_path / "run", **{section: {**part, name: value}})
    got = shutil.copytree(run, tmp_path / "got")
    (tmp_path / "r.yaml").symlink_to("got/config.yaml")
    for named in (got, got / "config.yaml", got / ".." / "got", tmp_path / "r.yaml"):
        with pytest.raises(PlanError, match=what) as caught:
            plan(named)
        assert f"say {key}=" in str(caught.value)
        assert "on the command line if you trust it" in str(caught.value)


def test_addresses_are_asked_for_again(tiny_model, tmp_path: Path, state: Path) -> None:
    channel = {"name": "redis", "url": "redis://:wonderful-secret@elsewhere:6379/0"}
    run = make_run(tiny_model, tmp_path / "run", channel=channel, store={"name": "mooncake", "master": "elsewhere:1"})
    with pytest.raises(PlanError) as caught:
        plan(shutil.copytree(run, tmp_path / "got"))
    for text in ("connect to redis://elsewhere:6379/0", "connect to elsewhere:1", "say store.master=elsewhere:1"):
        assert text in str(caught.value)
    assert "wonderful-secret" not in str(caught.value)


def test_what_the_command_line_says_is_allowed_and_said(tiny_model, tmp_path, state, caplog) -> None:
    run = make_run(tiny_model, tmp_path / "run", target={"trust_remote_code": True})
    got = shutil.copytree(run, tmp_path / "got")
    assert plan(got, "target.trust_remote_code=true").config.run.directory == got
    assert "as the command line says (target.trust_remote_code), this run may run Python code" in caplog.text
    whole = f"target={{name: hf, path: {tiny_model.path}, trust_remote_code: true}}"
    assert plan(got, whole).config.run.directory == got
    assert plan(got, "target.trust_remote_code=false").config.run.directory == got


def test_a_run_made_here_is_known_again_wherever_it_is_named_from(tiny_model, tmp_path, state, monkeypatch) -> None:
    run = make_run(tiny_model, tmp_path / "run", target={"trust_remote_code": True})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    for named in (run, Path("run"), Path("run/../run"), Path("link")):
        assert plan(named).config.run.directory == named
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["edited", "mark cut", "other mark", "no key", "key open to others", "other key"])
def test_a_run_that_was_changed_is_data(tiny_model, tmp_path: Path, state: Path, change: str) -> None:
    run = make_run(tiny_model, tmp_path / "run", target={"trust_remote_code": True})
    config = run / "config.yaml"
    text = config.read_text()
    changes = {
        "edited": lambda: config.write_text(text.replace("max_length: 64", "max_length: 63")),
        "mark cut": lambda: config.write_text(text.rpartition("# made here")[0]),
        "other mark": lambda: config.write_text(text.rpartition(": ")[0] + ": " + "0" * 64 + "\n"),
        "no key": state.unlink,
        "key open to others": lambda: state.chmod(0o644),
        "other key": lambda: state.write_bytes(b"k" * 32),
    }
    changes[change]()
    with pytest.raises(PlanError, match="run Python code"):
        plan(run)


def test_a_moved_run_that_asks_for_nothing_is_used_where_it_is(tiny_model, tmp_path: Path, state: Path) -> None:
    run = make_run(tiny_model, tmp_path / "run")
    got = run.rename(tmp_path / "got")
    assert plan(got).config.run.directory == got
    assert plan(got, f"run.directory={tmp_path / 'third'}").config.run.directory == tmp_path / "third"


def test_a_run_file_that_is_named_is_the_users_word(tiny_model, tmp_path: Path, state: Path) -> None:
    run = make_run(tiny_model, tmp_path / "run", target={"trust_remote_code": True})
    copy = shutil.copy(run / "config.yaml", tmp_path / "mine.yaml")
    assert plan(Path(copy)).config.run.directory == run
    (tmp_path / "project").mkdir()
    copy = shutil.copy(run / "config.yaml", tmp_path / "project" / "config.yaml")
    assert plan(Path(copy)).config.run.directory == run


@pytest.mark.parametrize("place", ["config.yaml", "metrics.jsonl", "checkpoints", "features/train/store", "logs"])
def test_a_received_directory_that_leads_elsewhere_is_refused(tiny_model, tmp_path, state, place: str) -> None:
    got = shutil.copytree(make_run(tiny_model, tmp_path / "run"), tmp_path / "got")
    (got / place).unlink(missing_ok=True)
    (got / place).parent.mkdir(parents=True, exist_ok=True)
    (got / place).symlink_to(tmp_path / "run" / "config.yaml")
    with pytest.raises(SpecForgeError, match="is a symbolic link"):
        load_run(got, [])


def test_nothing_fails_where_no_key_can_be_kept(tiny_model, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    run = make_run(tiny_model, tmp_path / "run")
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["directory"] == str(run)
    assert load_run(run, []).received


def test_a_run_file_without_end_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "config.yaml").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ConfigError, match="is longer than"):
        load_run(tmp_path, [])
    with pytest.raises(ConfigError, match="is longer than"):
        load_run((tmp_path / "config.yaml").rename(tmp_path / "mine.yaml"), [])


def test_a_users_own_run_file_is_no_run_directorys_for_lying_beside_checkpoints(tiny_model, tmp_path, state) -> None:
    """Nor is anything asked of the project that it lies in, such as to have no links."""
    run = make_run(tiny_model, tmp_path / "project", run={"directory": str(tmp_path / "runs" / "x")})
    (run / "provenance.json").unlink()
    (run / "checkpoints" / "checkpoint-500").mkdir(parents=True)
    (run / "data").symlink_to(tmp_path)
    loaded = load_run(run / "config.yaml", [])
    assert not loaded.received
    assert loaded.config.run.directory == tmp_path / "runs" / "x"


@pytest.mark.parametrize("artefact", ["provenance.json", "ledger.sqlite", "checkpoints/step-00000500"])
def test_a_run_files_name_in_a_run_directory_is_the_directorys(tiny_model, tmp_path, state, artefact: str) -> None:
    run = make_run(tiny_model, tmp_path / "run")
    (run / "provenance.json").unlink()
    write_text(run / artefact, "")
    assert load_run(shutil.copytree(run, tmp_path / "got") / "config.yaml", []).received
