# SPDX-License-Identifier: Apache-2.0
"""Size and digest of every file of a checkpoint: written last, compared before anything is read.

It vouches for exactly the files that are there: one that it does not list would be read uncompared. It is no signature:
whoever makes a whole checkpoint makes its manifest too, so what it vouches for is data all the same.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from specforge_core.checkpoint.layout import (
    INDEX,
    MANIFEST,
    PROGRESS,
    PROVENANCE,
    TENSORS,
    damaged,
    read_json,
    sync,
    write_json,
)
from specforge_core.contracts import CheckpointError
from specforge_core.contracts.files import describe_file

_FORMAT = 2
_NEEDED = (PROGRESS, PROVENANCE, f"{TENSORS}/{INDEX}")


def write_manifest(directory: Path) -> None:
    """Describe every file under ``directory`` and make them all durable."""
    names = _files(directory)
    for name in names:
        sync(directory / name)
    write_json(
        directory / MANIFEST, {"format": _FORMAT, "files": {name: describe_file(directory / name) for name in names}}
    )
    for path in [directory / MANIFEST, directory / TENSORS, directory]:
        if path.exists():
            sync(path)


def check_manifest(directory: Path) -> None:
    """:raises CheckpointError: a file is missing, short, altered, not listed or a link; it is named."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") == 1:
        raise CheckpointError(
            "this checkpoint was written by an earlier version of specforge, in a format that can run code when it is "
            "read; it is not read",
            where=str(directory),
            hint="go on with the version that wrote it, or train anew in another run.directory",
        )
    recorded = manifest.get("files")
    if manifest.get("format") != _FORMAT or not isinstance(recorded, dict):
        raise damaged(directory / MANIFEST, f"not a manifest of format {_FORMAT}")
    for name in _NEEDED:
        if name not in recorded:
            raise damaged(directory / MANIFEST, f"it does not list {name}")
    found = _files(directory)
    for name in sorted(recorded.keys() - set(found)):
        raise damaged(directory / name[:200], "the file is missing")
    for name in found:
        if name not in recorded:
            raise damaged(directory / name, "the manifest does not list this file")
        if describe_file(directory / name) != recorded[name]:
            raise damaged(directory / name, "its bytes are not the ones that were written")


def _files(directory: Path) -> list[str]:
    """Every file under ``directory`` but the manifest, by its path in it.

    :raises CheckpointError: one is a link, a pipe or a device.
    """
    names = []
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(folder) / name
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise damaged(path, "this is neither a file nor a directory (a link, perhaps)")
            if stat.S_ISREG(mode):
                names.append(path.relative_to(directory).as_posix())
    return sorted(name for name in names if name != MANIFEST)
