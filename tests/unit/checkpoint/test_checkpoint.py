# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is kept, what is refused, and what a full disk does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from specforge_core.checkpoint.manifest import write_manifest
from specforge_core.checkpoint.provenance import find_differences
from specforge_core.checkpoint.resume import CheckpointReader, find_latest, load_draft
from specforge_core.checkpoint.tensor_files import read_tensors, write_tensors
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


def test_a_provenance_that_was_made_up_is_said_in_few_words() -> None:
    """Spelt out, the dotted names of this one take 10 GB."""
    found = find_differences({"k" * 1_000_000: {str(i): ["v" * 1000] for i in range(10_000)}}, {"config": {"a": 1}})
    assert found[0] == "config.a: the checkpoint has nothing, this run has 1"
    assert len(found) == 101
    assert max(map(len, found)) < 1000


SHARD, INDEX = "tensors/shard-00000.safetensors", "tensors/index.json"


@pytest.mark.parametrize("name", [SHARD, INDEX, "progress.json", "provenance.json", "manifest.json"])
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


def _remade(step: Path) -> None:
    """The manifest of somebody who made the checkpoint: it vouches for what he put there."""
    (step / "manifest.json").unlink()
    write_manifest(step)


def _refused(directory: Path, match: str) -> None:
    for attempt in (
        lambda: load_draft(directory, _draft()),
        lambda: CheckpointReader(directory, PROVENANCE).resume(_tensors(_draft())),
    ):
        with pytest.raises(CheckpointError, match=match):
            attempt()


def test_an_earlier_versions_checkpoint_is_refused_unread(tmp_path: Path) -> None:
    step = _write(tmp_path, 1)
    (step / "manifest.json").write_text('{"format": 1, "files": {}}')
    _refused(tmp_path, "earlier version.*train anew")


def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    step = _write(tmp_path, 1)
    (step / "tensors" / "shard-00001.safetensors").write_bytes(b"x")
    _refused(tmp_path, r"shard-00001\.safetensors: .*does not list this file")


@pytest.mark.parametrize("name", [SHARD, "progress.json", "provenance.json"])
def test_a_manifest_that_leaves_a_file_out_is_refused(tmp_path: Path, name: str) -> None:
    step = _write(tmp_path, 1)
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["files"][name]
    (step / "manifest.json").write_text(json.dumps(manifest))
    _refused(tmp_path, "does not list")


@pytest.mark.parametrize("name", ["../../mine", "/etc/hostname", "tensors/../../../mine", "", "x" * 10_000])
def test_a_manifest_names_nothing_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").write_text("mine")
    step = _write(tmp_path / "checkpoints", 1)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 4, "blake2b": "0" * 32}
    (step / "manifest.json").write_text(json.dumps(manifest))
    _refused(tmp_path / "checkpoints", "the file is missing")


@pytest.mark.parametrize("name", ["tensors/index.json", "progress.json", "extra", "tensors"])
def test_a_link_in_a_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    step = _write(tmp_path / "checkpoints", 1)
    if (step / name).exists():
        (step / name).rename(tmp_path / "elsewhere")
    (step / name).symlink_to(tmp_path / "elsewhere")
    _refused(tmp_path / "checkpoints", "a link, perhaps")


def test_a_link_to_a_checkpoint_is_refused_and_never_cleared_through(tmp_path: Path) -> None:
    mine = _write(tmp_path / "mine", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-00000009").symlink_to(mine)
    (tmp_path / "run" / ".trash-step-00000008-1").symlink_to(tmp_path / "mine")
    _refused(tmp_path / "run", "this checkpoint is a link")
    (tmp_path / "run" / "step-00000009").unlink()
    _write(tmp_path / "run", 2)
    assert not (tmp_path / "run" / ".trash-step-00000008-1").is_symlink()
    assert load_draft(mine, _draft()) == 1


@pytest.mark.parametrize("content", [b"../mine", b"/etc/passwd", b"step-00000099", b""])
def test_a_pointer_to_nothing_of_ours_leads_to_the_latest(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path, 1, score=1.0)
    (tmp_path / "best").write_bytes(content)
    assert load_draft(tmp_path, _draft(), which="best") == 1


@pytest.mark.parametrize("content", [b"x" * 10_000, b"\xff"])
def test_a_damaged_pointer_is_refused(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path, 1, score=1.0)
    (tmp_path / "best").write_bytes(content)
    with pytest.raises(CheckpointError, match="pointer is damaged"):
        load_draft(tmp_path, _draft(), which="best")


def test_a_damaged_best_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 1, score=1.0)
    (tmp_path / "best").write_bytes(b"\xff")
    _write(tmp_path, 2, keep=1)
    assert _steps(tmp_path) == [1, 2], "which of them is the best cannot be told"
    _write(tmp_path, 3, score=0.5, keep=1)
    assert "does not count" in caplog.text
    assert (tmp_path / "best").read_text().strip() == "step-00000003"


RECORDS = {
    "step of another": {"step": 2},
    "step is true": {"step": True},
    "step is a word": {"step": "1"},
    "no epoch": {"epoch": None},
    "epoch below zero": {"epoch": -1},
    "score is a word": {"score": "high"},
    "score is no number": {"score": float("nan")},
    "score is a list": {"score": [1]},
}


@pytest.mark.parametrize("record", list(RECORDS))
def test_a_record_of_something_else_is_refused(tmp_path: Path, record: str) -> None:
    step = _write(tmp_path, 1)
    progress = json.loads((step / "progress.json").read_text()) | RECORDS[record]
    (step / "progress.json").write_text(json.dumps(progress))
    _remade(step)
    _refused(tmp_path, r"progress\.json: this checkpoint is damaged: (step|epoch|score) is ")


def test_a_score_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    _write(tmp_path, 1, score=float("nan"))
    assert not (tmp_path / "best").exists()
    assert load_draft(tmp_path, _draft()) == 1


def _index(chunks: list[dict[str, object]], **changes: object) -> dict[str, object]:
    tensor = {"dtype": "float32", "shape": [2, 3], "chunks": chunks, **changes}
    return {"format": 1, "tensors": {"draft.weight": tensor}}


def _chunk(row: int, rows: int, number: int, **changes: object) -> dict[str, object]:
    return {"shard": f"shard-{number:05d}.safetensors", "at": [row, 0], "shape": [rows, 3], **changes}


def _sharded(directory: Path, index: object) -> None:
    directory.mkdir()
    for row in range(2):
        save_file({"draft.weight": torch.full((1, 3), float(row))}, directory / f"shard-{row:05d}.safetensors")
    (directory / "index.json").write_text(json.dumps(index))


def test_chunks_of_several_ranks_are_put_together(tmp_path: Path) -> None:
    _sharded(tmp_path / "tensors", _index([_chunk(1, 1, 1), _chunk(0, 1, 0)]))
    found = {"draft.weight": torch.zeros(2, 3)}
    read_tensors(tmp_path / "tensors", found, prefixes=("draft.",))
    assert found["draft.weight"].tolist() == [[0.0] * 3, [1.0] * 3]


HOSTILE = {
    "a hole": _index([_chunk(0, 1, 0)]),
    "an overlap": _index([_chunk(0, 1, 0), _chunk(0, 1, 1)]),
    "outside": _index([_chunk(0, 1, 0), _chunk(2, 1, 1)]),
    "another rank": _index([_chunk(0, 1, 0), _chunk(1, 1, 1, at=[1], shape=[3])]),
    "negative": _index([_chunk(0, 3, 0), _chunk(1, 1, 1, shape=[-1, 3])]),
    "another shape than the shard's": _index([_chunk(0, 2, 0)]),
    "another dtype": _index([_chunk(0, 1, 0), _chunk(1, 1, 1)], dtype="int64"),
    "a shard elsewhere": _index([_chunk(0, 1, 0), _chunk(1, 1, 1, shard="../shard-00001.safetensors")]),
    "a shard that is not there": _index([_chunk(0, 1, 0), _chunk(1, 1, 7)]),
    "chunks are a word": _index("x"),  # type: ignore[arg-type]
    "no tensors": {"format": 1},
    "tensors are a list": {"format": 1, "tensors": []},
    "another format": {"format": 2, "tensors": {}},
    "a list": [],
}


@pytest.mark.parametrize("case", list(HOSTILE))
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, case: str) -> None:
    _sharded(tmp_path / "tensors", HOSTILE[case])
    with pytest.raises(CheckpointError, match="this checkpoint is damaged"):
        read_tensors(tmp_path / "tensors", {"draft.weight": torch.zeros(2, 3)}, prefixes=("draft.",))


def test_an_index_of_very_many_chunks_is_refused_at_once(tmp_path: Path) -> None:
    chunks = [_chunk(row, 1, 0) for row in (0, *range(9_999))]
    _sharded(tmp_path / "tensors", _index(chunks, shape=[10_000, 3]))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="overlap"):
        read_tensors(tmp_path / "tensors", {"draft.weight": torch.zeros(10_000, 3)}, prefixes=("draft.",))
    assert time.monotonic() - began < 5


def test_sizes_that_no_machine_has_are_refused_before_anything_is_taken(tmp_path: Path) -> None:
    _sharded(tmp_path / "tensors", _index([_chunk(0, 10**15, 0)], shape=[10**15, 3]))
    with pytest.raises(CheckpointError, match="of another draft"):
        read_tensors(tmp_path / "tensors", {"draft.weight": torch.zeros(2, 3)}, prefixes=("draft.",))


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {
        "draft.scalar": torch.tensor(3, dtype=torch.int64),
        "draft.empty": torch.zeros(0, 4),
        "draft.mask": torch.tensor([True, False]),
        "draft.bf16": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "draft.strided": torch.arange(12.0).reshape(3, 4).T,
        "draft.tied": shared,
        "draft.tied too": shared,
        "draft.part of it": shared[2:4],
    }
    write_tensors(tmp_path / "tensors", tensors)
    found = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    read_tensors(tmp_path / "tensors", found, prefixes=("draft.",))
    for name, tensor in tensors.items():
        assert found[name].contiguous().view(-1).tolist() == pytest.approx(tensor.reshape(-1).tolist(), nan_ok=True)


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
