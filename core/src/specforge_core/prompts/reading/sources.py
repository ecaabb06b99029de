# SPDX-License-Identifier: Apache-2.0
"""Sources as the run file names them to raw rows, one at a time: the first step of the stage; ``rows`` is the next.

A path is a file, a dataset on disk, a folder or a pattern; each file of a folder, a pattern or a hub data set is a
source of its own, in the order of their names. What a file is, its first bytes say: JSON (one object per line, or one
array of objects; also packed with gzip or zstandard), Parquet, Arrow or Feather.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts import DataError
from specforge_core.prompts.reading.arrow_rows import (
    ARROW_FILE,
    ARROW_STREAM,
    PARQUET,
    SPLITS_FILE,
    STATE_FILE,
    Table,
    arrow_rows,
    dataset_files,
)
from specforge_core.prompts.reading.hub import hub_files
from specforge_core.prompts.reading.json_rows import json_rows
from specforge_core.prompts.reading.raw_rows import Record
from specforge_core.prompts.reading.row_fields import ROW_KEYS
from specforge_core.prompts.regeneration.regenerated_set import MANIFEST_FILE, REPORT_FILE, find_origin

if TYPE_CHECKING:
    from specforge_core.config.run_config import HubSource

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
DATA_SUFFIXES = (*(s + packed for s in _TEXT_SUFFIXES for packed in ("", ".gz", ".zst", ".zstd")), *_TABLE_SUFFIXES)
_NO_DATA = frozenset((STATE_FILE, SPLITS_FILE, "dataset_info.json", "dataset_infos.json", MANIFEST_FILE, REPORT_FILE))
"""What lies beside data and ends as data do."""
_OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xfd7zXZ": "packed with xz: unpack it, or pack it with gzip or zstandard",
    b"BZh": "packed with bzip2: unpack it, or pack it with gzip or zstandard",
    b"FEA1": "a Feather file of version 1: write it again with version 2",
}
_TABLES_OF_TEXT = (".csv", ".tsv")
_NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file, or one dataset on disk.

    :param name: what messages call it.
    :param label: what made prompt ids begin with.
    :param origin: where it came from, to be recorded: the hub's data set and its commit.
    """

    path: Path
    name: str
    label: str
    origin: Mapping[str, str] = field(default_factory=dict)


def find_files(sources: Sequence[Path | HubSource | SourceFile]) -> list[SourceFile]:
    """Every file of every source, in order, with unique labels; files found before stay as they are.

    :raises DataError: a source is missing, or holds no data; a hub data set cannot be had.
    """
    if not sources:
        raise DataError("no prompts are given", where="data", hint="name JSONL files or datasets on disk")
    found: list[SourceFile] = []
    for source in sources:
        if isinstance(source, SourceFile):
            found.append(source)
        elif isinstance(source, Path):
            found += [SourceFile(path, str(path), _stem(path), find_origin(path)) for path in _files_of(source)]
        else:
            for path, name, origin in hub_files(source, DATA_SUFFIXES):
                label = f"{source.hub.rpartition('/')[2]}-{_stem(path)}"
                found.append(SourceFile(path, name, _safe(label), origin))
    return _with_unique_labels(found)


def read_records(source: SourceFile | Path, mapping: Mapping[str, str] = _NOTHING) -> Iterator[Record]:
    """The rows of one file, in order.

    :param mapping: what rows call the keys of ours; only tables need it, whose other columns are not read.
    :raises DataError: it is missing, of a kind that is not read, or damaged.
    """
    file = source if isinstance(source, SourceFile) else SourceFile(source, str(source), "")
    if file.path.is_dir():
        yield from arrow_rows(Table(dataset_files(file.path, file.name), file.name, _columns(mapping)))
        return
    if not file.path.is_file():
        raise _missing(file.path)
    if is_table(file.path, file.name):
        yield from arrow_rows(Table((file.path.resolve(),), file.name, _columns(mapping)))
    else:
        yield from json_rows(file.path, file.name)


def is_table(path: Path, name: str) -> bool:
    """Whether a file is read as a table, not as JSON.

    :raises DataError: it is neither.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=name, hint="check its permissions") from error
    for begin, what in _OTHERS.items():
        if head.startswith(begin):
            raise DataError(f"is {what.partition(':')[0]}", where=name, hint=what.partition(": ")[2])
    if path.suffix in _TABLES_OF_TEXT:
        raise DataError("is a table of text", where=name, hint="write it as JSONL or parquet")
    if not head:
        return False
    return head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)) or path.suffix in _TABLE_SUFFIXES


def _columns(mapping: Mapping[str, str]) -> frozenset[str]:
    mapped = {name for path in mapping.values() for name in (path, path.partition(".")[0])}
    return frozenset(ROW_KEYS) | mapped


def _missing(path: Path) -> DataError:
    reason = "is no regular file" if path.exists() else "there is no such file or directory"
    return DataError(reason, where=str(path), hint="correct the path under data")


def _files_of(source: Path) -> list[Path]:
    if source.is_dir():
        return _files_below(source)
    if source.exists() or not glob.has_magic(str(source)):
        return [source]
    matching = [Path(found) for found in sorted(glob.glob(str(source), recursive=True))]
    if not matching:
        raise DataError("no file matches", where=str(source), hint="correct the pattern under data")
    files = [path for match in matching for path in (_files_below(match) if match.is_dir() else [match])]
    return list(dict.fromkeys(files))


def _files_below(directory: Path) -> list[Path]:
    """A dataset on disk, or else the data files below."""
    if _is_dataset(directory):
        return [directory]
    found = list(_data_below(directory))
    if not found:
        raise DataError(
            "is not a dataset on disk, and holds no data files",
            where=str(directory),
            hint=f"name a JSONL file, or a folder of files that end in {', '.join(_TEXT_SUFFIXES + _TABLE_SUFFIXES)}",
        )
    return found


def _is_dataset(directory: Path) -> bool:
    return (directory / STATE_FILE).exists() or (directory / SPLITS_FILE).exists()


def _data_below(directory: Path) -> Iterator[Path]:
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror}", where=str(directory), hint="check its permissions"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from [entry] if _is_dataset(entry) else _data_below(entry)
        elif entry.is_file() and entry.name.lower().endswith(DATA_SUFFIXES) and entry.name not in _NO_DATA:
            yield entry


def _stem(path: Path) -> str:
    name = path.name.lower()
    suffix = max((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), key=len, default=path.suffix)
    return _safe(path.name.removesuffix(path.name[len(name) - len(suffix) :] if suffix else ""))


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:64] or "prompts"


def _with_unique_labels(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Where two files have one name, the later ones are numbered."""
    seen: set[str] = set()
    labelled: list[SourceFile] = []
    for file in files:
        label, count = file.label, 1
        while label in seen:
            count += 1
            label = f"{file.label}.{count}"
        seen.add(label)
        labelled.append(replace(file, label=label))
    return labelled
