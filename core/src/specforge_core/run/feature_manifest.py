# SPDX-License-Identifier: Apache-2.0
"""What a directory of captured features was captured from, so that nothing else is mixed into it or trained from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specforge_core.contracts import CaptureRequest, DataError, TargetInfo
from specforge_core.contracts.files import read_json_object
from specforge_core.contracts.kinds import shorten
from specforge_core.run.directory import write_json

FILE_NAME = "features.json"


def describe_features(info: TargetInfo, request: CaptureRequest, *, prompts: str) -> dict[str, Any]:
    """The manifest: which target, which features, which prompts (their fingerprint)."""
    return {
        "target": {
            "name_or_path": info.name_or_path,
            "architecture": info.architecture,
            "num_layers": info.num_layers,
            "hidden_size": info.hidden_size,
            "vocab_size": info.vocab_size,
        },
        "request": {**asdict(request), "aux_layer_ids": list(request.aux_layer_ids)},
        "prompts": prompts,
    }


def record_features(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Claim a feature directory for these features, or find that it is already theirs.

    :raises DataError: it holds other features; every difference is named.
    """
    if os.path.lexists(directory / FILE_NAME):
        check_features(directory, manifest)
    else:
        write_json(directory / FILE_NAME, manifest)


def check_features(directory: Path, manifest: Mapping[str, Any]) -> None:
    """:raises DataError: ``directory`` holds no features, or features of something else."""
    path = directory / FILE_NAME
    if not os.path.lexists(path):
        raise DataError(
            "there are no captured features here",
            where=str(directory),
            hint="run `specforge capture` with this run file first, or set data.features to where they are",
        )
    recorded = _read(path)
    differences = [
        f"{key}: captured with {shorten(recorded.get(key))}, this run has {shorten(manifest[key])}"
        for key in manifest
        if recorded.get(key) != manifest[key]
    ]
    if differences:
        raise DataError(
            "these features are of something else:\n" + "\n".join(f"  - {line}" for line in differences),
            where=str(directory),
            hint="choose another data.features (or run.directory), or make the run file agree",
        )


def _read(path: Path) -> Mapping[str, Any]:
    return read_json_object(
        path,
        refuse=lambda reason: DataError(
            f"not readable as JSON: {reason}", where=str(path), hint="remove this feature directory and capture again"
        ),
    )
