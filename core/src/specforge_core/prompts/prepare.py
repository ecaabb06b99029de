# SPDX-License-Identifier: Apache-2.0
"""Sources to a prompt set, once: what was prepared before is opened again as long as nothing it came from changed.

This is the stage's way in: ``rows`` gives rows, ``loss_mask`` encodes the conversations among them, ``prompt_set``
keeps the result. One row at a time is in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import ChatTokenizer, DataError, Progress, Prompt
from specforge_core.prompts.conversation import SourceRow
from specforge_core.prompts.directory_lock import locked
from specforge_core.prompts.json_rows import check_line_ends
from specforge_core.prompts.loss_mask import ConversationEncoder
from specforge_core.prompts.prompt_manifest import DamagedPrompts, read_manifest
from specforge_core.prompts.prompt_set import PromptSet
from specforge_core.prompts.prompt_writer import PromptSetWriter, remove_leftovers
from specforge_core.prompts.rows import BadRow, read_rows
from specforge_core.prompts.sources import SourceFile, find_files, is_table

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection, HubSource

_log = logging.getLogger(__name__)

_REPORT_EVERY = 64


def prepare_prompts(
    sources: Sequence[Path | HubSource],
    *,
    directory: Path,
    tokenizer: Callable[[], ChatTokenizer],
    settings: DataSection,
    vocab_size: int,
    progress: Progress,
) -> PromptSet:
    """Prompts of ``sources``, cut to ``settings.max_length``, without those that train nothing.

    :param directory: where the prompt set is kept; replaced when sources, settings or tokenizer changed.
    :param tokenizer: called only if there is text to encode.
    :param settings: ``max_prompts`` applies to these sources, whichever they are.
    :raises DataError: sources missing, empty or malformed; a token id the target does not have.
    """
    with locked(directory, progress=progress):
        return _prepare(sources, directory, _Preparation(tokenizer, settings, vocab_size), progress)


def _prepare(sources: Sequence[Path | HubSource], directory: Path, work: _Preparation, progress: Progress) -> PromptSet:
    remove_leftovers(directory)
    known = _known_sources(directory)
    entries = [_describe_source(file, known) for file in find_files(sources)]
    prepared = _reopen(directory, entries, work)
    if prepared is not None:
        return prepared
    progress.begin("preparing", work.max_prompts)
    with PromptSetWriter(directory) as writer:
        for count, row in enumerate(read_rows(sources, work.mapping), start=1):
            if isinstance(row, BadRow):
                raise row.error
            if work.max_prompts is not None and writer.prompts >= work.max_prompts:
                break
            prompt = work.encode(row)
            if prompt is not None:
                writer.add(prompt)
            if count % _REPORT_EVERY == 0:
                progress.advance(_REPORT_EVERY, dropped=work.dropped)
        writer.finish(
            fingerprint=_fingerprint(entries, work.rules, work.tokenizer_fingerprint),
            dropped=work.dropped,
            details={"sources": entries, "tokenizer": work.tokenizer_fingerprint},
        )
    return PromptSet.open(directory)


class _Preparation:
    """The rules of one preparation, and what they make of each row."""

    def __init__(self, tokenizer: Callable[[], ChatTokenizer], settings: DataSection, vocab_size: int):
        self.make_tokenizer = tokenizer
        self.max_prompts = settings.max_prompts
        self.mapping = settings.mapping
        self.rules: Mapping[str, Any] = {
            "max_length": settings.max_length,
            "last_turn_only": settings.last_turn_only,
            "max_prompts": settings.max_prompts,
            "vocab_size": vocab_size,
            "mapping": settings.mapping,
        }
        self._settings = settings
        self._vocab_size = vocab_size
        self._encoder: ConversationEncoder | None = None
        self.tokenizer_fingerprint = ""
        self.dropped = 0

    def encode(self, row: SourceRow) -> Prompt | None:
        """The row as a prompt; None if no token of it is trained."""
        if row.text is not None:
            raise DataError("rendered text is not encoded yet", where=row.where, hint="give input_ids and loss_mask")
        if row.conversation is not None and not row.input_ids:
            input_ids, mask = self._conversation_encoder().encode(row.conversation.messages, where=row.where)
        else:
            input_ids = list(row.input_ids[: self._settings.max_length])
            mask = list(row.loss_mask[: self._settings.max_length])
        if not any(mask):
            self.dropped += 1
            return None
        if max(input_ids) >= self._vocab_size:
            raise DataError(
                f"vocabulary mismatch: token id {max(input_ids)} in sample {row.prompt_id}, "
                f"but the target's vocabulary has {self._vocab_size}",
                where=row.where,
                hint="use the target's own tokenizer",
            )
        return Prompt(row.prompt_id, input_ids, mask)

    def _conversation_encoder(self) -> ConversationEncoder:
        if self._encoder is None:
            tokenizer = self.make_tokenizer()
            self.tokenizer_fingerprint = tokenizer.fingerprint
            self._encoder = ConversationEncoder(
                tokenizer, max_length=self._settings.max_length, last_turn_only=self._settings.last_turn_only
            )
        return self._encoder


def _reopen(directory: Path, entries: Sequence[Mapping[str, Any]], work: _Preparation) -> PromptSet | None:
    """What was prepared before, if it is whole and came from the same. A damaged or older set is prepared anew."""
    try:
        prepared = PromptSet.open(directory)
    except DamagedPrompts as error:
        _log.warning("%s: %s; they are prepared anew", error.where, error.message)
        return None
    except DataError:
        return None
    used, vocab_size = prepared.manifest["tokenizer"], work.rules["vocab_size"]
    came_from = _fingerprint(entries, work.rules, used)
    if prepared.fingerprint != came_from or prepared.largest_token_id >= vocab_size:
        return None
    return prepared if not used or work.make_tokenizer().fingerprint == used else None


def _fingerprint(entries: Sequence[Mapping[str, Any]], rules: Mapping[str, Any], tokenizer: str) -> str:
    """Of contents, not of paths or times, so that a copied corpus gives the same prompts under the same name."""
    contents = [(entry["name"], entry["sha256"]) for entry in entries]
    text = json.dumps([contents, rules, tokenizer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe_source(source: SourceFile, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Name, file sizes and times, and a digest of the contents, which is not computed again for unchanged files."""
    whole = source.path.is_dir()
    files = sorted(path for path in source.path.rglob("*") if path.is_file()) if whole else [source.path]
    if not files or not source.path.exists():
        raise DataError("no such file, or an empty directory", where=source.name, hint="correct data's paths")
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    before = known.get(str(source.path.absolute()))
    if before is not None and before["files"] == stats:
        return dict(before)
    digest = hashlib.sha256()
    for path in files:
        digest.update(_digest_file(path) if whole or is_table(path, source.name) else _digest_lines(path, source.name))
    described = {"path": str(source.path.absolute()), "name": source.path.name, "files": stats}
    return {**described, "sha256": digest.hexdigest(), **({"origin": dict(source.origin)} if source.origin else {})}


def _digest_lines(path: Path, name: str) -> bytes:
    """As ``_digest_file``; a file whose first lines have no end is refused there, however long it is."""
    digest = hashlib.sha256()
    for piece in check_line_ends(path, name):
        digest.update(piece)
    return digest.digest()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _known_sources(directory: Path) -> dict[str, Mapping[str, Any]]:
    try:
        manifest = read_manifest(directory)
    except DataError:
        return {}
    return {entry["path"]: entry for entry in manifest["sources"]}
