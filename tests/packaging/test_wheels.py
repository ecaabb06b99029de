# SPDX-License-Identifier: Apache-2.0
"""What a user gets who installs our wheels: parts appear, disappear, and one that is broken breaks only itself."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from clean_environment import PROJECTS, ROOT, CleanEnvironment
from tiny_model import TinyModel

pytestmark = pytest.mark.slow

BUILT_IN = {"feature-store:file", "feature-store:memory", "ref-channel:file", "ref-channel:memory"}


def listed(environment: CleanEnvironment) -> set[str]:
    ended = environment.specforge("plugins", "--json")
    assert ended.returncode == 0, ended.stderr
    return {f"{entry['kind']}:{entry['name']}" for entry in json.loads(ended.stdout)}


def write_run(directory: Path, strategy: str = "eagle3") -> Path:
    (directory / "train.jsonl").write_text("{}\n")
    values = {
        "run": {"directory": "runs/x"},
        "target": {"name": "hf", "path": "model"},
        "strategy": {"name": strategy},
        "data": {"train": ["train.jsonl"]},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def plan(environment: CleanEnvironment, directory: Path) -> subprocess.CompletedProcess[str]:
    return environment.specforge("plan", "run.yaml", cwd=directory)


def train_the_demo(environment: CleanEnvironment, tiny_model: TinyModel, directory: Path) -> None:
    """Run the demo's own run file, as the wheel ships it, on a target of test size."""
    values = yaml.safe_load((ROOT / "specforge_eagle3/src/specforge_eagle3/recipes/demo.yaml").read_text())
    values["run"] = {"directory": "runs/demo"}
    values["target"] |= {"path": str(tiny_model.path)}
    values["strategy"] |= {"draft_vocab_size": 128}
    values["data"] |= {"train": [str(tiny_model.train)], "eval": [str(tiny_model.eval)]}
    (directory / "demo.yaml").write_text(yaml.safe_dump(values))
    ended = environment.specforge("run", "demo.yaml", cwd=directory)
    assert ended.returncode == 0, ended.stderr
    assert (directory / "runs/demo/checkpoints/latest").is_file()


def test_version_is_the_one_file_and_wheels_are_typed(wheels: Mapping[str, Path]) -> None:
    version = (ROOT / "VERSION").read_text().strip()
    assert set(wheels) == set(PROJECTS)
    for name, wheel in wheels.items():
        names = zipfile.ZipFile(wheel).namelist()
        assert wheel.name.startswith(f"{name.replace('-', '_')}-{version}-")
        assert any(item.endswith("/py.typed") for item in names)
        assert not any(item.startswith(("src/", "tests/")) for item in names)


def test_parts_come_and_go_with_their_wheels(
    wheels: Mapping[str, Path], clean_environment: CleanEnvironment, tiny_model: TinyModel, tmp_path: Path
) -> None:
    write_run(tmp_path)
    clean_environment.install(wheels["specforge-core"])
    assert listed(clean_environment) == BUILT_IN
    ended = plan(clean_environment, tmp_path)
    assert ended.returncode == 2
    assert "pip install specforge-eagle3" in ended.stderr
    assert "pip install specforge-hf-target" in ended.stderr
    assert "Traceback" not in ended.stderr

    clean_environment.install(wheels["specforge-eagle3"], wheels["specforge-hf-target"])
    assert listed(clean_environment) == BUILT_IN | {"strategy:eagle3", "target-engine:hf"}
    checked = clean_environment.specforge("plugins", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "pip install" not in plan(clean_environment, tmp_path).stderr
    train_the_demo(clean_environment, tiny_model, tmp_path)

    clean_environment.uninstall("specforge-eagle3", "specforge-hf-target")
    assert listed(clean_environment) == BUILT_IN
    assert "pip install specforge-eagle3" in plan(clean_environment, tmp_path).stderr


def test_a_wheel_that_raises_on_import_breaks_nothing_else(
    wheels: Mapping[str, Path],
    clean_environment: CleanEnvironment,
    build_wheel: Callable[[str, str, str], Path],
    tmp_path: Path,
) -> None:
    broken = build_wheel("specforge-shattered", "shattered", "raise RuntimeError('it was never tested')\n")
    clean_environment.install(*wheels.values(), broken)
    write_run(tmp_path, "shattered")
    for arguments in (["--help"], ["--version"], ["plugins"], ["plugins", "check", "eagle3"], ["init", "new.yaml"]):
        ended = clean_environment.specforge(*arguments, cwd=tmp_path)
        assert ended.returncode == 0, f"{arguments}: {ended.stderr}"
    assert "left out" in clean_environment.specforge("schema").stderr
    checked = clean_environment.specforge("plugins", "check", "shattered")
    assert checked.returncode == 1
    for word in ("broken", "specforge-shattered 3.1", "RuntimeError: it was never tested"):
        assert word in checked.stdout
    ended = plan(clean_environment, tmp_path)
    assert ended.returncode == 2
    assert "specforge-shattered 3.1 is broken: RuntimeError: it was never tested" in ended.stderr
    assert "Traceback" not in ended.stderr
