# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints that are complete or invisible, points at the latest and the best, and clears old ones.

Everything is written into a directory aside, made durable, and renamed. A process killed at any moment leaves the
checkpoints that were there and, at most, a hidden directory that the next writer removes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_core.checkpoint import layout
from specforge_core.checkpoint.manifest import write_manifest
from specforge_core.checkpoint.tensor_files import WRITE_ERRORS, write_tensors
from specforge_core.contracts import CheckpointError

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """The one writer of a checkpoint directory.

    :param keep: latest checkpoints kept, besides the best.
    :param provenance: what the run is (JSON values); a resumed run is compared with it.
    """

    def __init__(self, directory: Path, *, keep: int, provenance: Mapping[str, Any]) -> None:
        self.directory = directory
        self._keep = keep
        self._provenance = json.loads(json.dumps(provenance))

    def write(
        self, step: int, *, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], score: float | None = None
    ) -> Path:
        """Write the checkpoint after optimizer step ``step``; returns its directory.

        :param tensors: what training continues from, by name.
        :param progress: where training stands (JSON values).
        :param score: higher is better; None where this step was not evaluated. One that is no number counts as none.
        :raises CheckpointError: it cannot be written; earlier checkpoints are untouched.
        """
        score = score if score is not None and math.isfinite(score) else None
        aside = self.directory / f"{layout.PARTIAL}{step:08d}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            aside.mkdir()
            write_tensors(aside / layout.TENSORS, tensors)
            layout.write_json(aside / layout.PROGRESS, {**progress, "step": step, "score": score})
            layout.write_json(aside / layout.PROVENANCE, self._provenance)
            write_manifest(aside)
            path = self._publish(aside, step)
            self._point(path, score)
        except WRITE_ERRORS as error:
            _remove(aside)
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written: {_reason(error)}",
                where=str(self.directory),
                hint="free space there or make it writable, then start the run again: "
                "it goes on from the checkpoint before, which is untouched",
            ) from error
        self._clear_old()
        return path

    def _publish(self, aside: Path, step: int) -> Path:
        path = layout.step_directory(self.directory, step)
        if path.exists():
            os.rename(path, self.directory / f"{layout.TRASH}{path.name}-{os.getpid()}")
        os.rename(aside, path)
        layout.sync(self.directory)
        return path

    def _point(self, path: Path, score: float | None) -> None:
        layout.write_pointer(self.directory / layout.LATEST, path.name)
        best_score = self._best_score()
        if score is not None and (best_score is None or score > best_score):
            layout.write_pointer(self.directory / layout.BEST, path.name)

    def _best_score(self) -> float | None:
        """Of the best so far; one that is damaged is warned of and does not count, for it cannot be used."""
        try:
            best = layout.find_best(self.directory)
            return None if best is None else layout.read_progress(best)["score"]
        except CheckpointError as error:
            _log.warning("the best checkpoint so far does not count: %s", error)
            return None

    def _clear_old(self) -> None:
        try:
            best = layout.find_best(self.directory)
        except CheckpointError:
            return  # which of them is the best cannot be told, so none goes
        for path in layout.complete_checkpoints(self.directory)[: -self._keep]:
            if path != best:
                self._discard(path)

    def _discard(self, path: Path) -> None:
        trash = self.directory / f"{layout.TRASH}{path.name}-{os.getpid()}"
        try:
            os.rename(path, trash)  # from here on it is no checkpoint, however far removing it gets
        except OSError as error:
            _log.warning("an old checkpoint stays: %s", error)
            return
        _remove(trash)

    def _clear_leftovers(self) -> None:
        for path in self.directory.iterdir():
            if path.name.startswith((layout.PARTIAL, layout.TRASH)):
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a directory if it can be removed; cleaning up never ends a run. Of a link, the link alone goes."""
    if not os.path.lexists(path):
        return
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", path, error)


def _reason(error: BaseException) -> str:
    """In one line."""
    text = str(error) or type(error).__name__
    return text.splitlines()[0]
