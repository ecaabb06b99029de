# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints: all of it to resume training, or the draft alone to evaluate, export or bench it.

What is damaged, or belongs to another run, is an error that says so; nothing is read from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from specforge_core.checkpoint import layout
from specforge_core.checkpoint.manifest import check_manifest
from specforge_core.checkpoint.provenance import find_differences
from specforge_core.checkpoint.tensor_files import read_tensors
from specforge_core.contracts import CheckpointError

DRAFT = "draft."
OPTIMIZER = "optimizer."


def find_latest(directory: Path) -> Path | None:
    """The complete checkpoint of the latest step, or None."""
    found = layout.complete_checkpoints(directory)
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class CheckpointReader:
    """Resumes a run from its checkpoint directory.

    :param provenance: what this run is; must agree with what the checkpoint recorded.
    """

    directory: Path
    provenance: Mapping[str, Any]

    def latest_step(self) -> int | None:
        """Finished optimizer steps of the latest checkpoint, or None where there is none; reads no tensors."""
        latest = find_latest(self.directory)
        return None if latest is None else layout.step_of(latest)

    def resume(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Fill ``tensors`` in place from the latest checkpoint and return its progress; None where there is none.

        :raises CheckpointError: it is damaged, of another run (with the differences) or of another draft.
        """
        latest = find_latest(self.directory)
        if latest is None:
            return None
        check_manifest(latest)
        differences = find_differences(layout.read_json(latest / layout.PROVENANCE), self.provenance)
        if differences:
            raise CheckpointError(
                "the checkpoint is of another run:\n" + "\n".join(f"  - {line}" for line in differences),
                where=str(latest),
                hint="undo these changes, or choose another run.directory for a new run",
            )
        read_tensors(latest / layout.TENSORS, tensors, prefixes=(DRAFT, OPTIMIZER))
        return layout.read_progress(latest)


def load_draft(directory: Path, draft: nn.Module, *, which: Literal["latest", "best"] = "latest") -> int:
    """Load a checkpoint's draft (in the draft's dtype) and return the step it is of.

    :param directory: one checkpoint's directory, or the directory that holds them.
    :param which: of several, the latest, or the best scored (the latest where none was scored).
    :raises CheckpointError: there is none, it is damaged, or it is of another draft.
    """
    path = _chosen(directory, which)
    check_manifest(path)
    into = {f"{DRAFT}{name}": tensor for name, tensor in draft.state_dict().items()}
    read_tensors(path / layout.TENSORS, into, prefixes=(DRAFT,))
    return int(layout.read_progress(path)["step"])


def _chosen(directory: Path, which: Literal["latest", "best"]) -> Path:
    if layout.step_of(directory) is not None and directory.is_dir():
        return directory.resolve()
    best = layout.find_best(directory) if which == "best" else None
    path = best or find_latest(directory)
    if path is None:
        raise CheckpointError(
            "there is no complete checkpoint here", where=str(directory), hint="train first, or name another directory"
        )
    return path
