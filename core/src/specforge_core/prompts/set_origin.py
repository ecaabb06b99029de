# SPDX-License-Identifier: Apache-2.0
"""What a prompt set came from: the contents of its sources, the settings that make prompts, and the tokenizer.

A set is opened again as long as all of it is the same. Torch is not imported here, so that ``plan`` can say whether
prompts are prepared already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.prompts.prompt_manifest import read_manifest
from specforge_core.prompts.reading.json_rows import check_line_ends
from specforge_core.prompts.reading.sources import SourceFile, is_table

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection

_RULES = ("max_length", "last_turn_only", "samples", "max_prompts", "template_arguments", "date", "mapping")
_RULES_FOR_BAD_ROWS = ("on_bad_row", "max_bad_rows")


@dataclass(frozen=True, slots=True)
class SetOrigin:
    """What a prompt set is made from, but for the tokenizer, which is known once a row needs it.

    :param sources: of each file its path, name, sizes and times, and a digest of its contents.
    """

    sources: Sequence[Mapping[str, Any]]
    rules: Mapping[str, Any]

    def fingerprint(self, tokenizer: str) -> str:
        """Of contents, not of paths or times, so that a copied corpus gives the same prompts under the same name."""
        contents = [(entry["name"], entry["sha256"]) for entry in self.sources]
        text = json.dumps([contents, self.rules, tokenizer], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_rules(settings: DataSection, vocab_size: int) -> dict[str, Any]:
    """The settings that decide what prompts there are."""
    chosen = settings.model_dump(mode="json", include={*_RULES, *_RULES_FOR_BAD_ROWS})
    return {**{name: chosen[name] for name in (*_RULES, *_RULES_FOR_BAD_ROWS)}, "vocab_size": vocab_size}


def find_prepared(
    files: Sequence[SourceFile], directory: Path, *, settings: DataSection, vocab_size: int
) -> int | None:
    """How many prompts are prepared from these very files with these settings; None if they are not.

    Nothing is read but the manifest: files count as unchanged by their sizes and times, and the tokenizer is not asked.
    """
    try:
        manifest = read_manifest(directory)
        stats = {str(file.path.absolute()): _stats(files_of(file)) for file in files}
    except DataError:
        return None
    known = {entry["path"]: entry for entry in manifest["sources"]}
    if any(path not in known or known[path]["files"] != found for path, found in stats.items()):
        return None
    origin = SetOrigin([known[path] for path in stats], make_rules(settings, vocab_size))
    prompts: int = manifest["prompts"]
    return prompts if origin.fingerprint(manifest["tokenizer"]) == manifest["fingerprint"] else None


def describe_sources(files: Sequence[SourceFile], directory: Path) -> list[dict[str, Any]]:
    """Of each file its path, name, sizes and times, and a digest, which is not computed again for unchanged files.

    :param directory: of the set that was prepared before, if any.
    :raises DataError: a file is missing or cannot be read.
    """
    known = known_sources(directory)
    return [_describe(file, known) for file in files]


def known_sources(directory: Path) -> dict[str, Mapping[str, Any]]:
    """What the set in ``directory`` was made from, by path."""
    try:
        manifest = read_manifest(directory)
    except DataError:
        return {}
    return {entry["path"]: entry for entry in manifest["sources"]}


def _describe(source: SourceFile, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    files = files_of(source)
    stats = _stats(files)
    before = known.get(str(source.path.absolute()))
    if before is not None and before["files"] == stats:
        return dict(before)
    digest, whole = hashlib.sha256(), source.path.is_dir()
    for path in files:
        digest.update(_digest_file(path) if whole or is_table(path, source.name) else _digest_lines(path, source.name))
    described = {"path": str(source.path.absolute()), "name": source.path.name, "files": stats}
    return {**described, "sha256": digest.hexdigest(), **({"origin": dict(source.origin)} if source.origin else {})}


def _stats(files: Sequence[Path]) -> list[list[Any]]:
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def files_of(source: SourceFile) -> list[Path]:
    """The file, or those of a dataset on disk. :raises DataError: there are none."""
    whole = source.path.is_dir()
    files = sorted(path for path in source.path.rglob("*") if path.is_file()) if whole else [source.path]
    if not files or not source.path.exists():
        raise DataError("no such file, or an empty directory", where=source.name, hint="correct data's paths")
    return files


def _digest_lines(path: Path, name: str) -> bytes:
    """As ``_digest_file``; a file whose first lines have no end is refused there, however long it is."""
    digest = hashlib.sha256()
    for piece in check_line_ends(path, name):
        digest.update(piece)
    return digest.digest()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
