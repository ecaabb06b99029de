# SPDX-License-Identifier: Apache-2.0
"""`plugins new` writes what it promises and nothing else; what it cannot do is one message."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import specforge_core
from specforge_core.cli.plugin_skeleton import write_skeleton
from specforge_core.contracts import ConfigError, PluginError
from specforge_core.hooks.kinds import KIND_OF_GROUP, PARTS

RUFF = ["--isolated", "--line-length", "120", "--target-version", "py311", "--no-cache"]


@pytest.mark.parametrize("kind", PARTS)
def test_every_kind_is_a_distribution_with_its_entry_point(tmp_path: Path, kind: str) -> None:
    made = write_skeleton("two-words", kind, tmp_path / "made")
    project = tomllib.loads((made.directory / "pyproject.toml").read_text())["project"]
    assert project["name"] == made.distribution
    [(group, points)] = project["entry-points"].items()
    assert KIND_OF_GROUP[group] == kind
    [(name, value)] = points.items()
    assert name == "two-words"
    module = made.directory / "src" / Path(*value.split(".")).with_suffix(".py")
    assert module in made.files
    assert (made.directory / "README.md").is_file()


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_written_is_whole_and_tidy(tmp_path: Path, kind: str) -> None:
    made = write_skeleton("mine", kind, tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == list(made.files)
    for path in made.files:
        assert not re.search("@[A-Z]+@|__package__", path.read_text()), path
    for command in (["check", "--select", "E,F,UP,B,SIM"], ["format", "--check"]):
        ended = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *RUFF, tmp_path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("kind", PARTS)
def test_the_suites_subclass_is_six_lines(tmp_path: Path, kind: str) -> None:
    """Head and docstring apart."""
    made = write_skeleton("mine", kind, tmp_path)
    tree = ast.parse((made.directory / "tests" / "test_contract.py").read_text())
    [suite] = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    body = [node for node in suite.body if not isinstance(node, ast.Expr)]
    assert sum(node.end_lineno - node.lineno + 1 for node in body) <= 6


@pytest.mark.parametrize("kind", PARTS)
def test_only_what_is_open_to_plugins_is_imported(tmp_path: Path, kind: str) -> None:
    made = write_skeleton("mine", kind, tmp_path)
    for path in (path for path in made.files if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("specforge_core"):
                inside = node.module.split(".")[1:2]
                assert inside in ([], ["contracts"], ["modeling"], ["testing"]), f"{path}: {node.module}"
                assert inside or {alias.name for alias in node.names} <= set(specforge_core.__all__)


@pytest.mark.parametrize("name", ["", "Mine", "my_part", "-x", "x-", "1st", "a--b", "../x", "x/y", "é", "a b"])
def test_names_that_no_part_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(PluginError, match="cannot name a part"):
        write_skeleton(name, "strategy", tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        write_skeleton("mine", "strategy", tmp_path)
    with pytest.raises(ConfigError, match="not empty"):
        write_skeleton("mine", "strategy", tmp_path / "kept.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_directory_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_skeleton("mine", "strategy", tmp_path / "file" / "below")


def test_an_installed_part_of_that_name_is_told(tmp_path: Path) -> None:
    assert write_skeleton("memory", "feature-store", tmp_path / "a").installed[0].startswith("specforge-core ")
    assert write_skeleton("memory", "strategy", tmp_path / "b").installed == ()


def test_the_command_says_what_comes_next(specforge, tmp_path: Path) -> None:
    ended = specforge("plugins", "new", "mine", "--kind", "ref-channel")
    assert ended.returncode == 0, ended.stderr
    assert "pip install -e 'specforge-mine-channel[test]' && specforge plugins check ref-channel:mine" in ended.stdout
    assert (tmp_path / "specforge-mine-channel" / "pyproject.toml").is_file()
    again = specforge("plugins", "new", "mine", "--kind", "ref-channel")
    wrong = specforge("plugins", "new", "mine", "--kind", "strategies")
    for refused, word in ((again, "--directory"), (wrong, "target-engine")):
        assert refused.returncode == 2
        assert word in refused.stderr
        assert "Traceback" not in refused.stderr
