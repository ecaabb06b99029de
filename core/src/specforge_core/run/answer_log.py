# SPDX-License-Identifier: Apache-2.0
"""Finished conversations, recorded by each process in a file of its own that the others look into.

A process keeps its file locked and beating, which is how the lease desk of the directory sees that it lives. Kinds of
records: ``V`` format and version (first), ``W`` who answers, ``A`` the rows of one conversation, ``E`` the numbers of
the conversations recorded since the last ``E``: without it they count as not recorded. ``C`` closed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge_core.contracts import ChannelError
from specforge_core.contracts.files import make_directory
from specforge_core.features.liveness import Heartbeat
from specforge_core.features.record_file import Record, RecordAppender, RecordTail, frame

ANSWERS_SUFFIX = ".answers"
_VERSION = ["specforge answers", 1]


class _AnswersTail:
    """One process's file as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered_by: dict[str, str] = {}
        self._tail = RecordTail(path)
        self._versioned = False
        self._pending: list[int] = []

    def read(self) -> Iterator[tuple[int, int]]:
        """What was recorded since the last time: each conversation's number and where its rows stand in the file."""
        while records := self._tail.read():
            for record in records:
                yield from self._replay(record)

    def _replay(self, record: Record) -> Iterator[tuple[int, int]]:
        if not self._versioned:
            if (record.kind, record.body()) != ("V", _VERSION):
                raise record.malformed("another format or version")
            self._versioned = True
        elif record.kind == "A":
            self._pending.append(record.offset)
        elif record.kind == "W":
            self.answered_by = _texts(record)
        elif record.kind == "E":
            numbers = record.body()
            if type(numbers) is not list or len(numbers) != len(self._pending):
                raise record.malformed("it does not number what stands before it")
            yield from zip(numbers, self._pending, strict=True)
            self._pending = []
        elif record.kind != "C":
            raise record.malformed(f"unknown kind {record.kind!r}")

    def close(self) -> None:
        self._tail.close()


def _texts(record: Record) -> dict[str, str]:
    body = record.body()
    if type(body) is not dict or not all(type(value) is str for value in body.values()):
        raise record.malformed("it does not say who answers")
    return body


class RecordedAnswers:
    """What all processes have recorded in a directory.

    :param count: of conversations there are.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self._directory = directory
        self._tails: dict[Path, _AnswersTail] = {}
        self._paths: list[Path] = []
        self._file_of = array("i", [-1]) * count
        self._offset_of = array("q", [0]) * count

    def refresh(self) -> None:
        """Read on. :raises ChannelError: a file was altered, or cannot be read."""
        for path in sorted(self._directory.glob(f"*{ANSWERS_SUFFIX}")):
            if path not in self._tails:
                self._tails[path] = _AnswersTail(path)
                self._paths.append(path)
            number = self._paths.index(path)
            for index, offset in self._tails[path].read():
                if type(index) is not int or not 0 <= index < len(self._file_of):
                    raise ChannelError(f"records conversation {index!r}, which there is not", where=str(path))
                if self._file_of[index] < 0:
                    self._file_of[index], self._offset_of[index] = number, offset

    def known(self, first: int, count: int) -> set[int]:
        """Which of these conversations were recorded when it was last refreshed."""
        return {index for index in range(first, first + count) if self._file_of[index] >= 0}

    def missing(self) -> int:
        self.refresh()
        return sum(number < 0 for number in self._file_of)

    def answered_by(self) -> list[dict[str, str]]:
        """Who answered, each once."""
        unlike = {tuple(sorted(tail.answered_by.items())) for tail in self._tails.values() if tail.answered_by}
        return [dict(items) for items in sorted(unlike)]

    def conversations(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of each, in order. Call once nothing is missing."""
        files = [path.open("rb") for path in self._paths]
        try:
            for number, offset in zip(self._file_of, self._offset_of, strict=True):
                files[number].seek(offset)
                line = files[number].readline().removesuffix(b"\n")
                yield Record(self._paths[number], offset, line).body()
        finally:
            for file in files:
                file.close()

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()


class AnswerFile:
    """This process's file, and what all have recorded: the ``AnswerLog`` of the loop."""

    def __init__(
        self, directory: Path, name: str, *, count: int, answered_by: Mapping[str, str], timeout_seconds: float
    ) -> None:
        make_directory(directory)
        self._file = RecordAppender(directory / f"{name}{ANSWERS_SUFFIX}")
        self._file.append([frame("V", _VERSION), frame("W", dict(answered_by))], durable=True)
        self._heartbeat = Heartbeat(self._file, timeout_seconds=timeout_seconds)
        self.all = RecordedAnswers(directory, count)

    def recorded(self, first: int, count: int) -> set[int]:
        self.all.refresh()
        return self.all.known(first, count)

    def append(self, rows: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        if rows:
            frames = [frame("A", list(made)) for made in rows.values()]
            self._file.append([*frames, frame("E", list(rows))], durable=True)

    def close(self) -> None:
        self._file.append([frame("C", None)], durable=False)
        self._heartbeat.stop()
        self._file.close()
        self.all.close()
