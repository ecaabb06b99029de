# SPDX-License-Identifier: Apache-2.0
"""What lies where in a checkpoint directory. A directory named ``step-…`` is complete; anything else is not there.

::

    step-00000500/            written aside and renamed, so its name is the proof of completeness
      tensors/                the draft (fp32 masters) and the optimizer's moments
      progress.json           finished steps, epoch, score
      provenance.json         what the run was
      manifest.json           size and digest of every file
    latest  best              names of step directories
    .partial-…  .trash-…      of a writer at work, or one that was killed; the next writer clears them
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.contracts import CheckpointError

TENSORS = "tensors"
PROGRESS = "progress.json"
PROVENANCE = "provenance.json"
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial-"
TRASH = ".trash-"

_STEP = re.compile(r"step-(\d{8,})")


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step ``step`` lies."""
    return directory / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's directory name, or None where the name is no checkpoint's."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every complete checkpoint, oldest step first."""
    if not directory.is_dir():
        return []
    found = {step: path for path in directory.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    return [found[step] for step in sorted(found)]


def find_best(directory: Path) -> Path | None:
    """The checkpoint that scored best, or None where none was scored.

    :raises CheckpointError: what points at it cannot be read.
    """
    pointer = directory / BEST
    if not pointer.is_file():
        return None
    try:
        path = directory / pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"this pointer is damaged: {error}", where=str(pointer), hint="remove it, or say --checkpoint latest"
        ) from error
    return path if step_of(path) is not None and path.is_dir() else None


def read_json(path: Path) -> dict[str, Any]:
    """:raises CheckpointError: the file is missing or is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_pointer(path: Path, name: str) -> None:
    """Replace a pointer file so that a reader sees the old name or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(name + "\n", encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(path: Path, reason: str) -> CheckpointError:
    """The error for a file of a checkpoint that cannot be used."""
    return CheckpointError(
        f"this checkpoint is damaged: {reason}",
        where=str(path),
        hint="remove its step directory to go on from the checkpoint before it",
    )
