# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON files: one object per line, or one array of objects, as they are or packed with gzip or zstandard.

A file is unpacked and parsed as it is read, so no more than a row of it is in memory, whatever it unpacks to. A line
that is no row is given as an error and the next one read; an array that is damaged cannot be read on.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value
from specforge_core.prompts.reading.json_array import ArrayReader
from specforge_core.prompts.reading.raw_rows import MAX_ROW_BYTES, Record, too_long

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
_MAX_WINDOW_BYTES = 128 << 20
"""Of zstandard: what ``--long=27`` needs, which is the most that its own tool unpacks unasked."""
_MAX_SKIPPED_BYTES = 64 * MAX_ROW_BYTES
"""How far the end of a line is looked for that is too long already: longer ones have none, it seems."""
_MAX_BLANK_LINES = 1 << 20
"""In a row: what has more is no file of rows."""
_CHUNK = 1 << 20
"""Read at once: a megabyte is as fast as more."""
_HINT = "one JSON object per line, or one array of objects"


def json_rows(path: Path, name: str) -> Iterator[Record]:
    """The rows of a file.

    :param name: what messages call it.
    :raises DataError: it cannot be opened, unpacked, or read on.
    """
    with _open(path, name) as file:
        head = file.peek(64)[:64].removeprefix(_BOM).lstrip()
        if head.startswith(b"["):
            reader = ArrayReader(file, name)
            for number, value, error in reader.elements():
                yield replace(_checked(number, value, error, f"{name}:{number}"), size=reader.size)
        else:
            yield from _lines(file, name)


def describe_text_file(path: Path, name: str) -> str:
    """What kind of JSON it is, and how it is packed, in words. :raises DataError: it cannot be opened or unpacked."""
    with path.open("rb") as packed:
        head = packed.read(4)
    how = ", gzip" if head.startswith(_GZIP) else ", zstandard" if head == _ZSTANDARD else ""
    with _open(path, name) as file:
        array = file.peek(64)[:64].removeprefix(_BOM).lstrip().startswith(b"[")
        return f"JSON {'array' if array else 'lines'}{how}"


def _lines(file: io.BufferedReader, name: str) -> Iterator[Record]:
    number = blank = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            yield Record(number, error=too_long(f"{name}:{number}"))
            _skip_line(file, line, f"{name}:{number}")
        elif line.strip():
            blank = 0
            yield replace(_parse_line(line, number, f"{name}:{number}"), size=len(line))
        else:
            blank += 1
        if blank > _MAX_BLANK_LINES:
            raise DataError(f"holds {blank} blank lines one after the other", where=f"{name}:{number}", hint=_HINT)


def _skip_line(file: io.BufferedReader, begun: bytes, where: str) -> None:
    skipped = len(begun)
    while begun and not begun.endswith(b"\n"):
        begun = file.readline(_CHUNK)
        skipped += len(begun)
        if skipped > _MAX_SKIPPED_BYTES:
            raise too_long(where)


def _parse_line(line: bytes, number: int, where: str) -> Record:
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError:
        return Record(number, error=DataError("is not UTF-8", where=where, hint="convert the file to UTF-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:SAID_CHARACTERS]
        return Record(number, error=DataError(f"is not JSON: {reason}", where=where, hint=_HINT))
    return _checked(number, value, "", where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """:raises ValueError: a key stands twice, so that it is not said which value counts."""
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {show_value(key)} stands twice")
            seen.add(key)
    return made


def _checked(number: int, value: Any, error: str, where: str) -> Record:
    if error:
        return Record(number, error=DataError(error, where=where, hint=_HINT))
    if not isinstance(value, dict):
        return Record(number, error=DataError(f"is a JSON {type(value).__name__}", where=where, hint=_HINT))
    return Record(number, value)


@contextmanager
def _open(path: Path, name: str) -> Iterator[io.BufferedReader]:
    """The file's content, unpacked; what goes wrong while it is read is an error of the file."""
    damage: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    try:
        with path.open("rb") as file:
            head = file.peek(4)[:4]
            if head.startswith(_GZIP):
                yield io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)), _CHUNK)
            elif head == _ZSTANDARD:
                unpacked, failure = _unpack_zstandard(file, name)
                damage = (*damage, failure)
                yield io.BufferedReader(cast("Any", unpacked), _CHUNK)
            else:
                yield file
    except damage as error:
        raise DataError(
            f"is damaged: {str(error)[:SAID_CHARACTERS]}", where=name, hint="copy or pack the file again"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=name, hint="check its permissions"
        ) from error


def _unreadable(error: OSError, name: str) -> DataError:
    return DataError(f"cannot be read: {error.strerror or error}", where=name, hint="check its permissions")


def _unpack_zstandard(file: IO[bytes], name: str) -> tuple[Any, type[Exception]]:
    try:
        import zstandard
    except ImportError as error:
        raise DataError(
            "reading .zst files needs the zstandard package", where=name, hint="pip install 'specforge-core[datasets]'"
        ) from error
    unpacking = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    return unpacking.stream_reader(file, read_across_frames=True), zstandard.ZstdError


def check_line_ends(path: Path, name: str) -> Iterator[bytes]:
    """The bytes of a text file in pieces, for a digest.

    :raises DataError: it cannot be read; or it goes on without an end of line, or with nothing but zeros, as a file
        does whose size was only claimed.
    """
    try:
        with path.open("rb") as file:
            array = file.peek(64)[:64].removeprefix(_BOM).lstrip().startswith(b"[")
            yield from _checked_pieces(file, name, array=array)
    except OSError as error:
        raise _unreadable(error, name) from error


def _checked_pieces(file: IO[bytes], name: str, *, array: bool) -> Iterator[bytes]:
    number, since = 1, 0
    while piece := file.read(_CHUNK):
        if array and b"\0" in piece:
            raise DataError("is not JSON: it holds zero bytes", where=name, hint=_HINT)
        ends = piece.count(b"\n")
        number += ends
        since = len(piece) - piece.rfind(b"\n") - 1 if ends else since + len(piece)
        if since > _MAX_SKIPPED_BYTES and not array:
            raise too_long(f"{name}:{number}")
        yield piece
