# SPDX-License-Identifier: Apache-2.0
"""What of its data a run will meet, without preparing them: what each source is, its first rows, what is prepared.

For ``specforge plan``: neither torch nor a tokenizer is imported, and nothing is fetched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.prompts.conversation import SourceRow
from specforge_core.prompts.reading.json_rows import describe_text_file
from specforge_core.prompts.reading.rows import parse_record
from specforge_core.prompts.reading.sources import SourceFile, find_files, is_table, read_records
from specforge_core.prompts.set_origin import files_of, find_prepared

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection, HubSource

_ROWS = 5
"""Looked at in each source: enough to see what its rows are."""
_FILES = 20
"""Looked at in each split; the others are only named by their number."""


def look_ahead(
    sources: Sequence[Path | HubSource], *, directory: Path, settings: DataSection, vocab_size: int
) -> dict[str, Any]:
    """``prepared``: how many prompts are, or None; ``sources``: of each what it is, as plain values.

    :param directory: where the prepared prompts are kept.
    """
    local = [source for source in sources if isinstance(source, Path)]
    remote = [source for source in sources if not isinstance(source, Path)]
    looked: list[dict[str, Any]] = [
        {"name": source.hub, "format": f"data set on the hub, revision {source.revision or 'main'}"}
        for source in remote
    ]
    try:
        files = find_files(local) if local else []
    except DataError as error:
        return {"prepared": None, "sources": [*looked, {"name": error.where, "problem": _in_words(error)}]}
    looked += [_look_at(file, settings.mapping) for file in files[:_FILES]]
    prepared = None if remote else find_prepared(files, directory, settings=settings, vocab_size=vocab_size)
    return {"prepared": prepared, "sources": looked, "more_sources": max(len(files) - _FILES, 0)}


def _look_at(file: SourceFile, mapping: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": file.name}
    try:
        found["bytes"] = sum(path.stat().st_size for path in files_of(file))
        found["format"] = _format_of(file)
        found["first_rows"] = dict(Counter(_first_rows(file, mapping)))
    except DataError as error:
        found["problem"] = _in_words(error)
    return found


def _format_of(file: SourceFile) -> str:
    if file.path.is_dir():
        return "dataset on disk"
    return "table" if is_table(file.path, file.name) else describe_text_file(file.path, file.name)


def _first_rows(file: SourceFile, mapping: Mapping[str, str]) -> Iterator[str]:
    """What the first rows are. :raises DataError: one of them cannot be used."""
    empty = True
    for record in islice(read_records(file, mapping), _ROWS):
        empty = False
        row = parse_record(record, prompt_id="row", where=f"{file.name}:{record.number}", mapping=mapping)
        yield _kind_of(row)
    if empty:
        raise DataError("holds no prompts", where=file.name, hint="one JSON object per line")


def _kind_of(row: SourceRow) -> str:
    if row.input_ids:
        return "tokens"
    if row.conversation is None:
        return "text"
    turns = len(row.conversation.messages)
    return f"conversation of {turns} turns" + (" with tools" if row.conversation.tools else "")


def _in_words(error: DataError) -> str:
    return f"{error.where}: {error.message}" if error.where else error.message
