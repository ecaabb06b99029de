# SPDX-License-Identifier: Apache-2.0
"""What was made so far: one append-only file per process, one line per conversation, synced before the next is asked.

A line that a kill tore is cut when its file is opened again, and passed over by others. When all conversations are
there, the lines become ``rows.jsonl`` in the order of the source, whoever made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular

ROWS_FILE = "rows.jsonl"
_SUFFIX = ".journal"
_LONGEST_LINE = 256 << 20
"""A conversation of sixteen million tokens; nothing longer is asked for."""


class Journal:
    """One process's file. Closing it leaves it there.

    :raises DataError: it cannot be written.
    """

    def __init__(self, directory: Path, name: str):
        self._path = directory / f"{name}{_SUFFIX}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = os.fdopen(open_regular(self._path, os.O_RDWR | os.O_CREAT), "r+b")
            self._file.seek(_whole_length(self._file))
            self._file.truncate()
        except OSError as error:
            raise self._refused(error) from error

    def append(self, place: int, rows: Sequence[Mapping[str, Any]], ending: str) -> None:
        """Keep a conversation's rows; durable when this returns."""
        line = json.dumps({"place": place, "ending": ending, "rows": rows}, ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> DataError:
        return DataError(
            f"answers cannot be written: {error.strerror}",
            where=str(self._path),
            hint="free space or correct permissions there; what was made before is kept",
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


class Journals:
    """All files of a directory, as they grow."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._read: dict[Path, int] = {}
        self.endings: dict[int, str] = {}
        """How the conversation at each place ended, for those that did."""
        self._lines: dict[int, tuple[Path, int]] = {}

    def refresh(self) -> None:
        """Read what was appended since.

        :raises DataError: a line is not what a journal holds.
        """
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            with open(open_regular(path, os.O_RDONLY), "rb") as file:
                position = self._read.get(path, 0)
                file.seek(position)
                while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                    place, ending = _read_line(line, path)
                    self.endings.setdefault(place, ending)
                    self._lines.setdefault(place, (path, position))
                    position += len(line)
                self._read[path] = position

    def merge(self, target: Path) -> str:
        """Write every conversation's rows in order; returns their SHA-256. Complete or not at all."""
        digest = hashlib.sha256()
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            for place in sorted(self._lines):
                path, position = self._lines[place]
                with open(open_regular(path, os.O_RDONLY), "rb") as journal:
                    journal.seek(position)
                    rows = json.loads(journal.readline(_LONGEST_LINE))["rows"]
                for row in rows:
                    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                    digest.update(line)
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        return digest.hexdigest()

    def remove(self) -> None:
        """The files are no longer needed."""
        for path in self._directory.glob(f"*{_SUFFIX}"):
            path.unlink(missing_ok=True)


def _whole_length(file: BinaryIO) -> int:
    """Up to the end of the last line that has one."""
    length = 0
    while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
        length += len(line)
    return length


def _read_line(line: bytes, path: Path) -> tuple[int, str]:
    try:
        content = json.loads(line)
        place, ending = content["place"], content["ending"]
        good = type(place) is int and isinstance(ending, str) and isinstance(content["rows"], list)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise DataError("is damaged: a line is no conversation", where=str(path), hint="delete the file")
    return place, ending
