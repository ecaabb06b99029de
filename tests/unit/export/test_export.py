# SPDX-License-Identifier: Apache-2.0
"""An export appears only if reading it back gives the draft that was written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from specforge_core.contracts import CaptureRequest, Drafter, ExportError, TargetInfo
from specforge_core.export.writer import ExportPlan, check_export, export_draft
from torch import Tensor, nn
from toy_decoding import ScriptedDrafter
from toy_strategy import ToyDraft, ToyStrategy, build_draft

INFO = TargetInfo("counting", "Counting", 4, 6, 11, "float32", 8, 1, 1, 6, 1e-6, 64)


class ToySource:
    info = INFO

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return {}

    def token_counts(self) -> Tensor:
        return torch.ones(INFO.vocab_size, dtype=torch.int64)


class SumDrafter(ScriptedDrafter):
    """Proposes a token that depends on the draft's weights and on something outside its state."""

    def __init__(self, draft: ToyDraft) -> None:
        super().__init__(right_until=0)
        self._token = int(draft.inner.weight.abs().sum() * 1000) + getattr(draft, "offset", 0)

    def extend(self, token_ids: Tensor, features: Mapping[str, Tensor]) -> None:
        assert features["aux_hidden_states"].shape[-1] == INFO.hidden_size

    def propose(self, max_tokens: int) -> Tensor:
        return torch.tensor([self._token])


class ExportingStrategy(ToyStrategy):
    """Writes and reads its tensors; ``spoil`` is done to the draft that was read."""

    def __init__(self, spoil=lambda draft: None) -> None:
        super().__init__()
        self._spoil = spoil

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return CaptureRequest(aux_layer_ids=(1,))

    def drafter(self, draft: nn.Module, target) -> Drafter:
        return SumDrafter(draft)

    def export(self, draft: nn.Module, directory: Path, *, format: str, target: TargetInfo) -> None:
        save_file(draft.state_dict(), directory / "model.safetensors")

    def load_export(self, directory: Path, target) -> nn.Module:
        draft = build_draft(seed=9)
        draft.load_state_dict(load_file(directory / "model.safetensors"))
        self._spoil(draft)
        return draft


def write(directory: Path, strategy: ExportingStrategy, *, overwrite: bool = False) -> Path:
    plan = ExportPlan(directory=directory, format="toy", provenance={"step": 7}, overwrite=overwrite)
    return export_draft(strategy, build_draft(), ToySource(), plan=plan)


def test_export_holds_weights_and_where_they_come_from(tmp_path):
    directory = write(tmp_path / "export" / "toy", ExportingStrategy())
    assert (directory / "model.safetensors").is_file()
    facts = json.loads((directory / "specforge.json").read_text())
    assert list(facts.pop("files")) == ["model.safetensors"]
    assert facts == {"format": "toy", "target": "counting", "step": 7}
    assert [path.name for path in directory.parent.iterdir()] == ["toy"]


def change_one_bit(draft: ToyDraft) -> None:
    flat = draft.inner.weight.data.view(torch.int32)
    flat[0, 0] ^= 1


def change_dtype(draft: ToyDraft) -> None:
    draft.heads[0].half()


def lose_buffer(draft: ToyDraft) -> None:
    del draft.kept


def forget_setting(draft: ToyDraft) -> None:
    draft.offset = 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change_one_bit, "inner.weight"),
        (change_dtype, "heads.0"),
        (lose_buffer, "kept"),
        (forget_setting, "proposes"),
    ],
)
def test_export_that_reloads_to_another_draft_is_refused_and_leaves_nothing(tmp_path, spoil, said):
    with pytest.raises(ExportError, match=said):
        write(tmp_path / "toy", ExportingStrategy(spoil))
    assert list(tmp_path.iterdir()) == []


def test_directory_in_use_is_kept_unless_overwriting(tmp_path):
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "notes").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        write(directory, ExportingStrategy())
    assert (directory / "notes").read_text() == "mine"
    with pytest.raises(ExportError):
        write(directory, ExportingStrategy(lose_buffer), overwrite=True)
    assert (directory / "notes").read_text() == "mine"
    write(directory, ExportingStrategy(), overwrite=True)
    assert not (directory / "notes").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "toy").write_text("a file")
    with pytest.raises(ExportError, match="file of that name"):
        write(tmp_path / "toy", ExportingStrategy(), overwrite=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ALTERED = {
    "a flipped bit": lambda directory: flip(directory / "model.safetensors"),
    "a file gone": lambda directory: (directory / "model.safetensors").unlink(),
    "a file more": lambda directory: (directory / "more").mkdir() or (directory / "more" / "x.py").write_text(""),
    "a record that is no JSON": lambda directory: (directory / "specforge.json").write_text("[" * 5000),
    "a record of another kind": lambda directory: (directory / "specforge.json").write_text('{"files": [1]}'),
    "a record that names the outside": lambda directory: (directory / "specforge.json").write_text(
        '{"files": {"../../mine": {"bytes": 4, "blake2b": ""}}}'
    ),
}


@pytest.mark.parametrize("how", list(ALTERED))
def test_an_export_that_was_altered_is_refused(tmp_path: Path, how: str) -> None:
    directory = write(tmp_path / "toy", ExportingStrategy())
    check_export(directory)
    ALTERED[how](directory)
    with pytest.raises(ExportError, match="altered since it was exported"):
        check_export(directory)


def test_an_export_of_another_trainer_vouches_for_nothing(tmp_path: Path) -> None:
    directory = write(tmp_path / "toy", ExportingStrategy())
    (directory / "specforge.json").unlink()
    flip(directory / "model.safetensors")
    check_export(directory)


def test_an_export_whose_files_are_links_into_a_cache_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path / "toy", ExportingStrategy())
    (directory / "model.safetensors").rename(tmp_path / "blob")
    (directory / "model.safetensors").symlink_to(tmp_path / "blob")
    check_export(directory)


def test_an_export_is_not_written_through_links(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (tmp_path / "toy").symlink_to(outside)
    for overwrite in (False, True):
        with pytest.raises(ExportError, match="file of that name"):
            write(tmp_path / "toy", ExportingStrategy(), overwrite=overwrite)
    (tmp_path / "toy").unlink()
    (tmp_path / "export").symlink_to(outside)
    with pytest.raises(ExportError, match="cannot be written: is a symbolic link"):
        write(tmp_path / "export" / "toy", ExportingStrategy())
    assert [path.name for path in outside.iterdir()] == ["mine"]
