# SPDX-License-Identifier: Apache-2.0
"""What a prompt set's ``manifest.json`` says: how many prompts and tokens, and of each file its size and digest.

The digests tell what a disk or a copy altered. They are no signatures: whoever writes into the directory can make them
fit, so the arrays are looked at as well (``prompt_set``).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from specforge_core.contracts import DataError
from specforge_core.contracts.files import read_json_object
from specforge_core.prompts.report import is_report

FORMAT = 3
INPUT_IDS_FILE, LOSS_MASK_FILE, OFFSETS_FILE = "input_ids.i32", "loss_mask.u8", "offsets.i64"
IDS_FILE, MANIFEST_FILE = "prompt_ids.txt", "manifest.json"
ARRAYS = (INPUT_IDS_FILE, LOSS_MASK_FILE, OFFSETS_FILE, IDS_FILE)
REJECTS_FILE = "rejects.jsonl"
"""Rows that could not be used, where there were some: for people, and not read again."""
MAX_ID_BYTES = 200
"""An id becomes part of a file name, which takes 255 with what is added."""

_PROMPT_ID = re.compile(rb"[^\x00-\x20/\\\x7f.][^\x00-\x1f/\\\x7f]{0,%d}" % (MAX_ID_BYTES - 1))
"""One part of a file name: ids become one (``features``)."""
_KINDS: Mapping[str, type] = {
    **{"prompts": int, "tokens": int, "dropped": int, "fingerprint": str},
    **{"sizes": dict, "digests": dict, "tokenizer": str, "sources": list, "report": list},
}
_SOURCE_KINDS: Mapping[str, type] = {"path": str, "name": str, "files": list, "sha256": str}


def is_prompt_id(prompt_id: bytes) -> bool:
    """Whether it can be told from others and be part of a file name."""
    try:
        prompt_id.decode()
    except UnicodeDecodeError:
        return False
    return _PROMPT_ID.fullmatch(prompt_id) is not None


class DamagedPrompts(DataError):
    """Prepared prompts that are not what was written."""

    def __init__(self, directory: Path, reason: str) -> None:
        super().__init__(
            f"the prepared prompts cannot be used: {reason}", where=str(directory), hint="delete the directory"
        )


def make_manifest(content: Mapping[str, Any]) -> str:
    """The text of a manifest with this content, its own digest included."""
    fields = {"format": FORMAT, "byteorder": sys.byteorder, "tokenizer": "", "sources": [], "report": [], **content}
    return json.dumps({**fields, "digest": _digest(fields)}, indent=1) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """
    :raises DataError: nothing was prepared there, or by another version.
    :raises DamagedPrompts: it is not what ``make_manifest`` gave.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise DataError("holds no prepared prompts", where=str(directory), hint="prepare them again")
    manifest = read_json_object(path, refuse=lambda reason: DamagedPrompts(directory, f"{MANIFEST_FILE}: {reason}"))
    if (manifest.get("format"), manifest.get("byteorder")) != (FORMAT, sys.byteorder):
        raise DataError(
            "the prepared prompts are of another version, or of another kind of machine",
            where=str(directory),
            hint="delete the directory",
        )
    problem = _find_problem(manifest)
    if problem:
        raise DamagedPrompts(directory, f"{MANIFEST_FILE}: {problem}")
    return manifest


def _find_problem(manifest: Mapping[str, Any]) -> str:
    for key, kind in _KINDS.items():
        if type(manifest.get(key)) is not kind:
            return f"{key} is missing or no {kind.__name__}"
    if not 1 <= manifest["prompts"] <= manifest["tokens"] or manifest["dropped"] < 0:
        return "its counts cannot be"
    for key, kind in (("sizes", int), ("digests", str)):
        found = manifest[key]
        if set(found) != set(ARRAYS) or any(type(value) is not kind for value in found.values()):
            return f"{key} are not those of the four files"
    for source in manifest["sources"]:
        if not isinstance(source, dict) or any(type(source.get(k)) is not kind for k, kind in _SOURCE_KINDS.items()):
            return "sources are not files with digests"
    if not all(is_report(entry) for entry in manifest["report"]):
        return "report is not what was counted of each source"
    fields = {key: value for key, value in manifest.items() if key != "digest"}
    return "" if manifest.get("digest") == _digest(fields) else "it was altered"


def _digest(fields: Mapping[str, Any]) -> str:
    return str(xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode()))
