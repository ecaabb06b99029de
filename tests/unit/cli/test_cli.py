# SPDX-License-Identifier: Apache-2.0
"""The command as a user has it: light listings, messages instead of tracebacks, broken plugins kept apart."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_distributions import STRATEGY, install_strategy, install_target
from specforge_core.config.load import load_run_config

SECONDS = 120


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    return directory


def python_path(site: Path) -> str:
    return os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))


def specforge(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "specforge_core.cli.main", *arguments]
    variables = {**os.environ, "PYTHONPATH": python_path(site), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=site.parent, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def install_broken(site: Path, source: str = "raise RuntimeError('boom [red]')") -> None:
    install_strategy(site, "broken-strategy", "shattered", modules={"broken_strategy": source})


def write_run(site: Path, **changes: object) -> None:
    values = {
        "run": {"directory": "runs/x"},
        "target": {"name": "fake"},
        "strategy": {"name": "fancy"},
        "data": {"train": ["train.jsonl"], "max_length": 64},
        **changes,
    }
    (site.parent / "train.jsonl").write_text("{}\n")
    (site.parent / "run.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"]])
def test_light_commands_import_neither_torch_nor_pydantic(site: Path, arguments: list[str]) -> None:
    program = (
        "import sys\nfrom specforge_core.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=site, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    assert child.stderr.strip() == "[]"


def test_plan_imports_no_torch(site: Path) -> None:
    install_strategy(site, "plain-strategy", "fancy")
    install_target(site, "plain-target", "fake")
    write_run(site)
    program = (
        "import sys\nfrom specforge_core.cli.main import main\n"
        "try: main(['plan', 'run.yaml'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": python_path(site)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert child.stderr.strip() == "[]"
    for word in ("fancy", "plain-strategy", "aux_hidden_states", "window", "capture", "train"):
        assert word in child.stdout


@pytest.mark.parametrize(
    "source",
    ["raise RuntimeError('boom [red]')", "import sys; sys.exit(7)", "import os; os._exit(9)", "x ="],
)
def test_a_broken_plugin_breaks_nothing_but_itself(site: Path, source: str) -> None:
    install_broken(site, source)
    install_strategy(site, "plain-strategy", "fancy")
    install_target(site, "plain-target", "fake")
    write_run(site)
    for arguments in (["--help"], ["plugins"], ["plan", "run.yaml"]):
        assert specforge(site, *arguments).returncode == 0
    checked = specforge(site, "plugins", "check", "shattered", "--json")
    assert checked.returncode == 1
    [result] = json.loads(checked.stdout)
    assert (result["status"], result["distribution"]) == ("broken", "broken-strategy")
    assert result["detail"]


def test_choosing_a_broken_plugin_is_one_message(site: Path) -> None:
    install_broken(site)
    write_run(site, strategy={"name": "shattered"}, target={"name": "absent"})
    ended = specforge(site, "plan", "run.yaml")
    assert ended.returncode == 2
    assert ended.stdout == ""
    for word in ("run.yaml: strategy.name (line", "broken-strategy 1.0", "RuntimeError: boom [red]", "absent"):
        assert word in ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_has_a_deadline(site: Path) -> None:
    install_broken(site, "import time; time.sleep(60)")
    ended = specforge(site, "plugins", "check", "shattered", "--deadline", "2")
    assert ended.returncode == 1
    assert "within 2 s" in ended.stdout


def test_environment_and_option_disable(site: Path) -> None:
    install_strategy(site, "plain-strategy", "fancy")
    for listed in (
        specforge(site, "plugins", "--json", SPECFORGE_DISABLE_PLUGINS="fancy, file"),
        specforge(site, "--no-plugin", "fancy", "--no-plugin", "file", "plugins", "--json"),
    ):
        disabled = {entry["name"] for entry in json.loads(listed.stdout) if entry["status"] == "disabled"}
        assert disabled == {"fancy", "file"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plann"], "did you mean 'plan'"),
        (["plan"], "Missing argument"),
        (["--no-plugin", "fil", "plugins"], "did you mean 'file'"),
        (["plan", "none.yaml"], "none.yaml: there is no such run file"),
        (["plan", "."], "no run"),
        (["plugins", "show", "nothing"], "no plugin named 'nothing'"),
        (["init", "there.yaml"], "is there already"),
        (["init", "no/such/place.yaml"], "cannot be written"),
    ],
)
def test_users_errors_end_with_2_and_no_traceback(site: Path, arguments: list[str], message: str) -> None:
    (site.parent / "there.yaml").write_text("kept")
    ended = specforge(site, *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (site.parent / "there.yaml").read_text() == "kept"


def test_init_writes_a_file_that_loads(site: Path) -> None:
    assert specforge(site, "init", "mine.yaml").returncode == 0
    loaded = load_run_config(site.parent / "mine.yaml")
    assert str(loaded.config.run.directory) == "runs/mine"


def test_show_and_schema_and_doctor(site: Path) -> None:
    install_strategy(site, "plain-strategy", "fancy")
    shown = specforge(site, "plugins", "show", "fancy")
    assert "layers" in shown.stdout
    assert "plain-strategy 1.0" in shown.stdout
    assert "strategy.fancy" in json.loads(specforge(site, "schema").stdout)["$defs"]
    found = json.loads(specforge(site, "doctor", "--json").stdout)
    assert found["torch"]["version"]


@pytest.mark.parametrize("ending", ["import sys; sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_a_plugin_that_ends_the_process_is_a_message(site: Path, ending: str) -> None:
    install_broken(site, ending)
    write_run(site, strategy={"name": "shattered"})
    ended = specforge(site, "plan", "run.yaml")
    assert ended.returncode == 2
    assert "of broken-strategy 1.0 is broken" in ended.stderr
    checked = specforge(site, "plugins", "check", "shattered")
    assert checked.returncode == 1
    assert "broken" in checked.stdout


def test_a_plugin_that_leaves_while_its_settings_are_read_is_a_message(site: Path) -> None:
    leaving = STRATEGY.replace("layers: tuple[int, ...] = (0,)", "layers: tuple = Field(default_factory=sys.exit)")
    install_broken(site, "import sys\nfrom pydantic import Field\n" + leaving.replace("{name}", "shattered"))
    install_target(site, "plain-target", "fake")
    write_run(site, strategy={"name": "shattered"})
    for arguments in (["plan", "run.yaml"], ["run", "run.yaml"], ["plugins", "show", "shattered"]):
        ended = specforge(site, *arguments)
        assert ended.returncode == 2
        assert re.search(r"failed on these settings: SystemExit|called sys.exit\(None\)", ended.stderr)


@pytest.mark.parametrize("key", ["run.directory", "run.token_file", "data.train", "data.features"])
def test_a_path_that_no_file_can_have_is_a_message(site: Path, key: str) -> None:
    install_strategy(site, "plain-strategy", "fancy")
    install_target(site, "plain-target", "fake")
    write_run(site)
    name = "x" * 5000
    ended = specforge(site, "plan", "run.yaml", f"{key}={f'[{name}]' if key == 'data.train' else name}")
    assert ended.returncode == 2
    assert "File name too long" in ended.stderr
    assert len(ended.stderr) < 1000
    assert specforge(site, "plan", name).returncode == 2


def test_no_module_of_the_current_directory_is_imported(site: Path) -> None:
    install_strategy(site, "plain-strategy", "fancy")
    for module in ("torch", "json", "specforge_core"):
        (site.parent / f"{module}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    program = ["-P", "-m", "specforge_core.cli.main"]
    for arguments in (["doctor"], ["plugins", "check"]):
        environment = {**os.environ, "PYTHONPATH": python_path(site)}
        subprocess.run([sys.executable, *program, *arguments], cwd=site.parent, env=environment, check=False)
        assert not (site.parent / "ran").exists()


def test_ctrl_c_while_a_plugin_loads_ends_the_command(site: Path) -> None:
    install_broken(site, "import pathlib, time; pathlib.Path('loading').touch(); time.sleep(60)")
    write_run(site, strategy={"name": "shattered"})
    process = subprocess.Popen(
        [sys.executable, "-m", "specforge_core.cli.main", "plan", "run.yaml"],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": python_path(site)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (site.parent / "loading").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode == 130
