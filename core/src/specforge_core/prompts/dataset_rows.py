# SPDX-License-Identifier: Apache-2.0
"""Rows of a Hugging Face dataset on disk, as plain values: what ``Dataset.save_to_disk`` wrote, read as Arrow.

Nothing is decoded: a column of pictures may name an address or a file, and decoding it would go there. So only the
columns that prompts are made of are read, without the features that ``dataset_info.json`` claims, and only if their
types are those of text, numbers and lists. ``reader`` makes rows of them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular, read_json_object
from specforge_core.contracts.redaction import show_value

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("id", "messages", "conversations", "input_ids", "loss_mask")
"""What rows are made of; anything else in a dataset is not read."""
_SHOWN_CHARACTERS = 200
_SPLITS_FILE, _STATE_FILE = "dataset_dict.json", "state.json"


def dataset_rows(directory: Path, *, most_values: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers, from 1, and rows.

    :param most_values: characters, list items and numbers of a row; a larger one is refused before it is read.
    :raises DataError: not such a directory, several splits, a damaged file, or a column that prompts are not made of.
    """
    rows = (row for path in _data_files(directory) for row in _rows_of(path, directory, most_values))
    for number, row in enumerate(rows, start=1):
        if row is None:
            raise _too_large(f"{directory}:{number}", most_values)
        yield number, row


def _data_files(directory: Path) -> list[Path]:
    if (directory / _SPLITS_FILE).exists():
        raise _several_splits(directory)

    def refuse(reason: str) -> DataError:
        return DataError(
            f"is not a dataset on disk: {_STATE_FILE}: {reason}",
            where=str(directory),
            hint="save_to_disk writes one; or name a JSONL file",
        )

    state = read_json_object(directory / _STATE_FILE, refuse=refuse)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise refuse("it lists no files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise refuse("it is of an old version and selects rows; save the dataset again")
    names = [entry.get("filename") for entry in listed]
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise refuse(f"{show_value(name)} is no file of this directory")
    return [directory / str(name) for name in names]


def _several_splits(directory: Path) -> DataError:
    def refuse(reason: str) -> DataError:
        return DataError(f"is not a dataset on disk: {_SPLITS_FILE}: {reason}", where=str(directory))

    names = read_json_object(directory / _SPLITS_FILE, refuse=refuse).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return refuse("it lists no splits")
    shown = ", ".join(name if name.isprintable() else repr(name) for name in sorted(names)[:20])
    return DataError(
        f"holds several splits: {shown[:_SHOWN_CHARACTERS]}",
        where=str(directory),
        hint=f"name one, such as {directory / (min(names) if min(names).isprintable() else 'train')}",
    )


@contextmanager
def _reading(path: Path, directory: Path) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            "reading a dataset directory needs the pyarrow package",
            where=str(directory),
            hint="pip install 'specforge-core[datasets]'",
        ) from error
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"is damaged: {str(error)[:_SHOWN_CHARACTERS]}",
            where=str(path),
            hint="copy the dataset again, or save it anew",
        ) from error


def _rows_of(path: Path, directory: Path, most_values: int) -> Iterator[Mapping[str, Any] | None]:
    """The rows of one file; None in place of one that holds more than ``most_values``."""
    for batch in _batches(path, directory):
        small = _count_values(batch) <= most_values
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            yield row.to_pylist()[0] if small or _count_values(row) <= most_values else None


def _batches(path: Path, directory: Path) -> Iterator[pa.RecordBatch]:
    with _reading(path, directory):
        yield from _checked_batches(path, directory)


def _checked_batches(path: Path, directory: Path) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    schema = pa.ipc.open_stream(content).schema
    used = [index for index, name in enumerate(schema.names) if name in COLUMNS]
    if not used:
        raise DataError(
            f"has none of the columns {', '.join(COLUMNS)}; it has {show_value(schema.names)}",
            where=str(directory),
            hint="a row is a conversation, or input_ids with loss_mask",
        )
    with pa.ipc.open_stream(content, options=pa.ipc.IpcReadOptions(included_fields=used)) as stream:
        for batch in stream:
            batch.validate(full=True)  # lengths and offsets lead nowhere else
            _check_types(batch, path)
            yield batch


def _check_types(batch: pa.RecordBatch, path: Path) -> None:
    for name, column_type in zip(batch.schema.names, batch.schema.types, strict=True):
        if not _is_plain(column_type):
            raise DataError(
                f"column {name} has type {str(column_type)[:_SHOWN_CHARACTERS]}, which no prompt consists of",
                where=str(path),
                hint="text, numbers, and lists of them are read",
            )


def _is_plain(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    text = types.is_string(kind) or types.is_large_string(kind)
    return bool(text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or kind == "null")


def _count_values(batch: pa.RecordBatch) -> int:
    return sum(_count(column) for column in batch.columns)


def _count(column: pa.Array) -> int:
    """Values, of text its bytes, that become Python objects."""
    from pyarrow import types

    if types.is_list(column.type) or types.is_large_list(column.type):
        return len(column) + _count(column.flatten())
    if types.is_struct(column.type):
        return len(column) + sum(_count(child) for child in column.flatten())
    if types.is_string(column.type) or types.is_large_string(column.type):
        return len(column) + int(column.nbytes)
    return len(column)


def _too_large(where: str, most_values: int) -> DataError:
    return DataError(
        f"the row holds more than {most_values} characters and numbers",
        where=where,
        hint="split it: a prompt is cut at data.max_length tokens anyway",
    )
