# SPDX-License-Identifier: Apache-2.0
"""Rows of Arrow and Parquet files as plain values: parquet, feather, and what ``Dataset.save_to_disk`` wrote.

Nothing is decoded: a column of pictures may name an address or a file, and decoding it would go there. So only the
columns that prompts are made of are read, without the features that ``dataset_info.json`` claims, and only if their
types are those of text, numbers and lists. What is null in an object is left out of it: such files keep one list of
keys for all objects of a column. ``sources`` makes records of the rows.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular, read_json_object
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value
from specforge_core.prompts.reading.raw_rows import MAX_ROW_BYTES, Record

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
"""How these files begin."""
SPLITS_FILE, STATE_FILE = "dataset_dict.json", "state.json"
_BATCH_ROWS = 64
"""Of a parquet file unpacked at a time: a page is, whatever it holds, so few rows are no slower."""


@dataclass(frozen=True, slots=True)
class Table:
    """Files of one table, and what is read of it.

    :param name: what messages call it.
    :param columns: that something is made of, if they are there.
    """

    files: tuple[Path, ...]
    name: str
    columns: Collection[str]


def arrow_rows(table: Table) -> Iterator[Record]:
    """:raises DataError: a damaged file, or a column of a type that prompts are not made of."""
    number = 0
    for path in table.files:
        with _reading(path, table):
            for record in _records_of(path, number + 1, table):
                number = record.number
                yield record


def _records_of(path: Path, first: int, table: Table) -> Iterator[Record]:
    for batch, unread in _batches(path, table):
        yield from _records(batch, first, table, unread=unread)
        first += batch.num_rows


def _records(batch: pa.RecordBatch, first: int, table: Table, *, unread: frozenset[str]) -> Iterator[Record]:
    whole = _count_values(batch)
    small = whole <= MAX_ROW_BYTES
    for index in range(batch.num_rows):
        row, number = batch.slice(index, 1), first + index
        size = whole // batch.num_rows if small else _count_values(row)
        if size <= MAX_ROW_BYTES:
            yield Record(number, _without_nulls(row.to_pylist()[0]), size=size, unread=unread)
        else:
            yield Record(number, error=_too_large(f"{table.name}:{number}"))


def dataset_files(directory: Path, name: str) -> tuple[Path, ...]:
    """The files of a dataset on disk, as its state lists them.

    :raises DataError: several splits, or not such a dataset.
    """
    if (directory / SPLITS_FILE).exists():
        raise _several_splits(directory)

    def refuse(reason: str) -> DataError:
        return DataError(
            f"is not a dataset on disk: {STATE_FILE}: {reason}",
            where=name,
            hint="save_to_disk writes one; or name a JSONL file",
        )

    state = read_json_object(directory / STATE_FILE, refuse=refuse)
    listed = state.get("_data_files")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise refuse("it lists no files")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise refuse("it is of an old version and selects rows; save the dataset again")
    names = [entry.get("filename") for entry in listed]
    for given in names:
        if not isinstance(given, str) or given in ("", ".", "..") or "/" in given or "\0" in given:
            raise refuse(f"{show_value(given)} is no file of this directory")
    return tuple(directory / str(given) for given in names)


def _several_splits(directory: Path) -> DataError:
    def refuse(reason: str) -> DataError:
        return DataError(f"is not a dataset on disk: {SPLITS_FILE}: {reason}", where=str(directory))

    names = read_json_object(directory / SPLITS_FILE, refuse=refuse).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return refuse("it lists no splits")
    shown = ", ".join(name if name.isprintable() else repr(name) for name in sorted(names)[:20])
    return DataError(
        f"holds several splits: {shown[:SAID_CHARACTERS]}",
        where=str(directory),
        hint=f"name one, such as {directory / (min(names) if min(names).isprintable() else 'train')}",
    )


@contextmanager
def _reading(path: Path, table: Table) -> Iterator[None]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            "reading Arrow and Parquet files needs the pyarrow package",
            where=table.name,
            hint="pip install 'specforge-core[datasets]'",
        ) from error
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(
            f"is damaged: {str(error)[:SAID_CHARACTERS]}",
            where=str(path),
            hint="copy the dataset again, or save it anew",
        ) from error


def _batches(path: Path, table: Table) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    import pyarrow as pa

    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    head = bytes(content[: len(ARROW_FILE)])
    read = _stream_batches
    if head.startswith(PARQUET):
        read = _parquet_batches
    elif head == ARROW_FILE:
        read = _file_batches
    yield from read(content, table)


def _stream_batches(content: pa.Buffer, table: Table) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    import pyarrow as pa

    used, unread = _choose(pa.ipc.open_stream(content).schema, table)
    with pa.ipc.open_stream(content, options=pa.ipc.IpcReadOptions(included_fields=used)) as stream:
        for batch in stream:
            batch.validate(full=True)  # lengths and offsets lead nowhere else
            yield batch, unread


def _file_batches(content: pa.Buffer, table: Table) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    import pyarrow as pa

    used, unread = _choose(pa.ipc.open_file(content).schema, table)
    with pa.ipc.open_file(content, options=pa.ipc.IpcReadOptions(included_fields=used)) as file:
        for index in range(file.num_record_batches):
            batch = file.get_batch(index)
            batch.validate(full=True)
            yield batch, unread


def _parquet_batches(content: pa.Buffer, table: Table) -> Iterator[tuple[pa.RecordBatch, frozenset[str]]]:
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
        used, unread = _choose(file.schema_arrow, table)
        names = [file.schema_arrow.names[index] for index in used]
        # Of the file's own statistics nothing is asked: some of those calls end the process where they are damaged.
        for batch in file.iter_batches(_BATCH_ROWS, columns=names, use_threads=False):
            batch.validate(full=True)
            yield batch, unread


def _choose(schema: pa.Schema, table: Table) -> tuple[list[int], frozenset[str]]:
    """Which columns are read, and the names of those that are not.

    :raises DataError: none, or one that no prompt consists of.
    """
    used = [index for index, name in enumerate(schema.names) if name in table.columns]
    if not used:
        raise DataError(
            f"has no column that a row is read from; it has {show_value(schema.names)}",
            where=table.name,
            hint="such as messages, conversations, prompt and completion; where they have other names, say so in "
            "data.mapping, such as {messages: dialogue}",
        )
    for index in used:
        if not _is_plain(schema.types[index]):
            raise DataError(
                f"column {schema.names[index]} has type {str(schema.types[index])[:SAID_CHARACTERS]}, "
                "which no prompt consists of",
                where=table.name,
                hint="text, numbers, and lists of them are read",
            )
    return used, frozenset(name for name in schema.names if name not in table.columns)


def _is_plain(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    text = types.is_string(kind) or types.is_large_string(kind)
    return bool(text or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or kind == "null")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return [_without_nulls(item) for item in value]
    return value


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


def _too_large(where: str) -> DataError:
    return DataError(
        f"the row holds more than {MAX_ROW_BYTES} characters and numbers",
        where=where,
        hint="split it: a prompt is cut at data.max_length tokens anyway",
    )
