# SPDX-License-Identifier: Apache-2.0
"""A full disk at every stage: refused with exit status 2, nothing partial is left, and the same command goes on later.

Full is a limit on the size of any file (which needs no rights), and a really full small file system where this test
may mount one.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_input import RUN, Workshop, contents
from specforge_core.cli.main import main


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes, as on a disk with so much room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail for lack of room; returns its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
    return err


def works(arguments: Sequence[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def weights(root: Path) -> bytes:
    return min((root / "checkpoints" / "step-00000003" / "tensors").glob("*.safetensors")).read_bytes()


def whole_checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir() if path.is_dir())


def _prepare_nothing(w: Workshop) -> None:
    w.run_file()


def _prepare_captured(w: Workshop) -> None:
    root = w.finished()
    for path in root.iterdir():
        if path.name != "features":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _prepare_trained(w: Workshop) -> None:
    shutil.rmtree(w.finished() / "export")


STAGES: list[tuple[str, Callable[[Workshop], None], list[str], int, tuple[str, ...]]] = [
    ("prompts", _prepare_nothing, ["capture", "run.yaml"], 200, ("run/features/eval/prompts", "free space")),
    (
        "features",
        _prepare_nothing,
        ["capture", "run.yaml"],
        8000,
        ("run/features/", "store", ".safetensors", "free space"),
    ),
    ("lock", _prepare_captured, ["train", "run.yaml"], 0, ("run", "nothing can be written here", "free space")),
    ("metrics", _prepare_captured, ["train", "run.yaml"], 2500, ("run/", "cannot be written", "free space")),
    ("checkpoints", _prepare_captured, ["train", "run.yaml"], 120000, ("run/checkpoints", "step 2", "free space")),
    ("export", _prepare_trained, ["export", RUN], 30000, ("run/export/sglang", "cannot be written", "free space")),
    ("bench", _prepare_trained, ["bench", RUN], 200, ("run/bench.json", "cannot be written", "free space")),
    ("report", _prepare_trained, ["report", RUN], 2000, ("run/report", "cannot be written", "free space")),
]


@pytest.mark.parametrize("stage", STAGES, ids=[stage[0] for stage in STAGES])
def test_no_room_at_any_stage(
    stage: tuple[str, Callable[[Workshop], None], list[str], int, tuple[str, ...]],
    workshop: Workshop,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, prepare, command, limit, says = stage
    prepare(workshop)
    before = contents(workshop.root)
    with file_size_limit(limit):
        err = refused(command, capsys)
    missing = [fragment for fragment in says if fragment not in err]
    assert not missing, f"{missing} not in:\n{err}"
    after = contents(workshop.root)
    kept = {name: content for name, content in before.items() if not name.endswith((".lock", ".counts"))}
    assert [name for name, content in kept.items() if after.get(name) != content] == []
    works(command)


def test_training_goes_on_to_the_same_weights_after_a_full_disk(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    _prepare_captured(workshop)
    with file_size_limit(120000):
        refused(["train", "run.yaml"], capsys)
    assert whole_checkpoints(workshop.root / RUN) == []
    works(["train", "run.yaml"])
    assert weights(workshop.root / RUN) == weights(workshop.trained)


@pytest.fixture
def small_disk(workshop: Workshop) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB in ``small``, where that is permitted."""
    place = workshop.root / "small"
    place.mkdir()

    def mount(kibibytes: int, *options: str) -> Path:
        line = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kibibytes}k", *options]), "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(line, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root")
        return place

    yield mount
    # Lazily: prompts mapped by a command that was refused in this process may still be open.
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


def test_a_full_file_system_while_capturing(
    workshop: Workshop, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small_disk(200)
    run_file = workshop.run_file(run={"directory": "small/run"})
    err = refused(["capture", run_file], capsys)
    assert "small/run/features/" in err
    assert "No space left on device" in err
    assert "free space" in err
    small_disk(4096, "remount")
    works(["run", run_file])
    assert weights(workshop.root / "small/run") == weights(workshop.trained)


def test_a_full_file_system_while_checkpointing(
    workshop: Workshop, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.finished()
    small_disk(700)
    run_file = workshop.run_file(run={"directory": "small/run"}, data={"features": f"{RUN}/features"})
    err = refused(["train", run_file, "checkpoint.every_steps=1"], capsys)
    assert "small/run/checkpoints" in err
    assert "free space" in err
    kept = whole_checkpoints(workshop.root / "small/run")
    assert kept
    assert not [name for name in kept if name.startswith(".")]
    small_disk(8192, "remount")
    works(["train", run_file])
    assert weights(workshop.root / "small/run") == weights(workshop.trained)


def test_a_read_only_run(
    workshop: Workshop, small_disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    place = small_disk(4096)
    shutil.copytree(workshop.finished(), place / "run")
    run_file = workshop.run_file(run={"directory": "small/run"})
    small_disk(4096, "remount", "ro")
    for command in (
        ["capture", run_file],
        ["train", run_file],
        ["export", run_file, "--overwrite"],
        ["bench", run_file],
    ):
        err = refused(command, capsys)
        assert "Read-only file system" in err
        assert "small/run" in err
