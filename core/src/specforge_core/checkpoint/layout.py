# SPDX-License-Identifier: Apache-2.0
"""What lies where in a checkpoint directory. A directory named ``step-…`` is complete; anything else is not there.

::

    step-00000500/            written aside and renamed, so its name is the proof of completeness
      tensors/                the draft (fp32 masters) and the optimizer's moments: shards and index.json
      progress.json           finished steps, epoch, score
      provenance.json         what the run was
      manifest.json           size and digest of every file
    latest  best              names of step directories
    .partial-…  .trash-…      of a writer at work, or one that was killed; the next writer clears them
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.contracts import CheckpointError
from specforge_core.contracts.files import read_bytes, read_json_object, replace_file

TENSORS = "tensors"
INDEX = "index.json"
PROGRESS = "progress.json"
PROVENANCE = "provenance.json"
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
PARTIAL = ".partial-"
TRASH = ".trash-"

_STEP = re.compile(r"step-(\d{8,18})")
_MAX_POINTER_BYTES = 100
"""A pointer holds the name of a step directory."""


def step_directory(directory: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step ``step`` lies."""
    return directory / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's directory name, or None where the name is no checkpoint's."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Every complete checkpoint, oldest step first.

    :raises CheckpointError: a link has the name of one; what it points at is none of this directory's.
    """
    if not directory.is_dir():
        return []
    found = {step: path for path in directory.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
    for path in found.values():
        if path.is_symlink():
            raise CheckpointError("this checkpoint is a link", where=str(path), hint="remove the link, or copy it here")
    return [found[step] for step in sorted(found)]


def find_best(directory: Path) -> Path | None:
    """The checkpoint that scored best, or None where none was scored.

    :raises CheckpointError: what points at it cannot be read.
    """
    pointer = directory / BEST
    if not os.path.lexists(pointer):
        return None
    try:
        name = read_bytes(pointer, limit=_MAX_POINTER_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"this pointer is damaged: {reason}", where=str(pointer), hint="remove it, or say --checkpoint latest"
        ) from error
    return next((path for path in complete_checkpoints(directory) if path.name == name), None)


def read_json(path: Path) -> dict[str, Any]:
    """:raises CheckpointError: the file is missing, a link, or is no JSON object."""
    return read_json_object(path, refuse=lambda reason: damaged(path, reason))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Where training stood: ``step`` (the directory's), ``epoch`` and ``score``, and whatever else was recorded.

    :raises CheckpointError: it is not a record of this checkpoint.
    """
    path = checkpoint / PROGRESS
    progress = read_json(path)
    step, epoch, score = (progress.get(key) for key in ("step", "epoch", "score"))
    if type(step) is not int or step != step_of(checkpoint):
        raise damaged(path, f"step is {step!r:.80}")
    if type(epoch) is not int or epoch < 0:
        raise damaged(path, f"epoch is {epoch!r:.80}")
    if score is not None and not (type(score) in (int, float) and math.isfinite(score)):
        raise damaged(path, f"score is {score!r:.80}")
    return progress


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_pointer(path: Path, name: str) -> None:
    """Replace a pointer file so that a reader sees the old name or the new one."""
    replace_file(path, f"{name}\n".encode())


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
