# SPDX-License-Identifier: Apache-2.0
"""Size and digest of every file of a checkpoint: written last, compared before anything is read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from specforge_core.checkpoint.layout import MANIFEST, damaged, read_json, sync, write_json

_FORMAT = 1


def write_manifest(directory: Path) -> None:
    """Describe every file under ``directory`` and make them all durable."""
    files = {}
    for path in _files(directory):
        sync(path)
        files[path.relative_to(directory).as_posix()] = _describe(path)
    write_json(directory / MANIFEST, {"format": _FORMAT, "files": files})
    for path in [directory / MANIFEST, directory, *(p for p in directory.rglob("*") if p.is_dir())]:
        sync(path)


def check_manifest(directory: Path) -> None:
    """:raises CheckpointError: a file is missing, short or altered; it is named."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise damaged(directory / MANIFEST, f"not a manifest of format {_FORMAT}")
    for name, recorded in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise damaged(path, "the file is missing")
        if _describe(path) != recorded:
            raise damaged(path, "its bytes are not the ones that were written")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}
