# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is kept, what is refused, and what a full disk does."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from specforge_core.checkpoint.provenance import find_differences
from specforge_core.checkpoint.resume import CheckpointReader, find_latest, load_draft
from specforge_core.checkpoint.writer import CheckpointWriter
from specforge_core.contracts import CheckpointError
from torch import nn

PROVENANCE = {"config": {"strategy": {"name": "toy", "layers": (1, 2)}, "training": {"threads": 2}}}


def _draft(fill: float = 1.0) -> nn.Module:
    draft = nn.Linear(3, 2)
    nn.init.constant_(draft.weight, fill)
    draft.register_buffer("table", torch.tensor([True, False]))
    return draft


def _tensors(draft: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {f"draft.{name}": tensor.detach() for name, tensor in draft.state_dict().items()}
    return {**tensors, "optimizer.step.weight": torch.tensor(3.0)}


def _write(directory: Path, step: int, *, score: float | None = None, keep: int = 2) -> Path:
    writer = CheckpointWriter(directory, keep=keep, provenance=PROVENANCE)
    return writer.write(step, tensors=_tensors(_draft(step)), progress={"epoch": 0}, score=score)


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in [(1, 1.5), (2, 2.5), (3, 2.0), (4, None), (5, 2.5)]:
        _write(tmp_path, step, score=score)
    assert _steps(tmp_path) == [2, 4, 5]
    assert (tmp_path / "latest").read_text().strip() == "step-00000005"
    assert (tmp_path / "best").read_text().strip() == "step-00000002"
    draft = _draft(0)
    assert load_draft(tmp_path, draft, which="best") == 2
    assert draft.weight[0, 0].item() == 2
    assert load_draft(tmp_path, draft) == 5
    assert load_draft(tmp_path / "step-00000004", draft) == 4
    assert draft.weight[0, 0].item() == 4


def test_what_a_killed_writer_left_is_invisible_and_cleared(tmp_path: Path) -> None:
    (tmp_path / ".partial-00000009-1" / "tensors").mkdir(parents=True)
    assert find_latest(tmp_path) is None
    _write(tmp_path, 1)
    assert not (tmp_path / ".partial-00000009-1").exists()


def test_a_draft_in_bf16_takes_rounded_masters(tmp_path: Path) -> None:
    path = _write(tmp_path, 3)
    draft = _draft(0).to(torch.bfloat16)
    load_draft(path, draft)
    assert draft.weight.dtype == torch.bfloat16
    assert draft.weight[0, 0].item() == 3


def test_resuming_fills_tensors_and_tells_progress(tmp_path: Path) -> None:
    _write(tmp_path, 7, score=1.25)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in _tensors(_draft()).items()}
    reader = CheckpointReader(tmp_path, PROVENANCE)
    assert reader.latest_step() == 7
    assert reader.resume(tensors) == {"epoch": 0, "step": 7, "score": 1.25}
    assert torch.equal(tensors["draft.weight"], torch.full((2, 3), 7.0))
    assert CheckpointReader(tmp_path / "none", PROVENANCE).resume(tensors) is None


def test_every_difference_is_listed_with_both_values(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    other = {"config": {"strategy": {"name": "other"}, "training": {"threads": 1}}, "prompts": "abc"}
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(tmp_path, other).resume(_tensors(_draft()))
    lines = str(caught.value)
    assert "config.strategy.layers: the checkpoint has [1, 2], this run has nothing" in lines
    assert "config.strategy.name: the checkpoint has 'toy', this run has 'other'" in lines
    assert "prompts: the checkpoint has nothing, this run has 'abc'" in lines
    assert "threads" not in lines


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("config.training.micro_batch_size", True),
        ("config.training.device", True),
        ("config.loading.prefetch_windows", True),
        ("config.bench.prompts", True),
        ("config.training.global_batch_size", False),
        ("config.training.dtype", False),
        ("config.training.epochs", False),
        ("config.run.seed", False),
        ("config.bench_more", False),
    ],
)
def test_what_may_differ_between_a_run_and_its_checkpoint(key: str, same: bool) -> None:
    def nested(value: int) -> dict[str, object]:
        record: object = value
        for part in reversed(key.split(".")):
            record = {part: record}
        assert isinstance(record, dict)
        return record

    assert (find_differences(nested(1), nested(2)) == []) is same


@pytest.mark.parametrize(
    "name", ["tensors/__0_0.distcp", "tensors/.metadata", "progress.json", "provenance.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    path = _write(tmp_path, 1) / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" + content[1:])
    for attempt in (
        lambda: load_draft(tmp_path, _draft()),
        lambda: CheckpointReader(tmp_path, PROVENANCE).resume(_tensors(_draft())),
    ):
        with pytest.raises(CheckpointError, match=name):
            attempt()


def test_an_index_that_would_run_code_is_refused(tmp_path: Path) -> None:
    from specforge_core.checkpoint.tensor_files import read_tensors

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = _write(tmp_path, 1)
    (path / "tensors" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="does not belong"):
        read_tensors(path / "tensors", _tensors(_draft()), prefixes=("draft.",))
    assert not (tmp_path / "owned").exists()


def test_another_drafts_checkpoint_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"draft\.weight: checkpoint \[2, 3\], draft \[2, 4\]"):
        load_draft(tmp_path, nn.Linear(4, 2))


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_draft(tmp_path / "nothing", _draft())


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the kernel fails the same write call."""
    program = (
        "import resource, signal, sys; from pathlib import Path; import torch\n"
        "from specforge_core.checkpoint.writer import CheckpointWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "writer = CheckpointWriter(Path(sys.argv[1]), keep=1, provenance={})\n"
        "tensors = {'draft.w': torch.ones(300_000)}\n"
        "writer.write(1, tensors=tensors, progress={})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "try:\n    writer.write(2, tensors=tensors, progress={})\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(f"CheckpointError {tmp_path}: the checkpoint of step 2 cannot be written"), done
    assert "free space" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    from specforge_core.checkpoint.manifest import check_manifest

    check_manifest(tmp_path / "step-00000001")


def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        _write(tmp_path / "file", 1)
