# SPDX-License-Identifier: Apache-2.0
"""The conversations that are to be answered, read from their sources once and found by their number from then on.

They are written beside the answers, so that every process that shares the work has the same ones, whatever becomes of
the sources meanwhile, and reaches each without reading those before it.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular, parse_json
from specforge_core.prompts.conversation import Conversation, SourceRow
from specforge_core.prompts.reading.rows import BadRow, read_rows
from specforge_core.prompts.reading.sources import SourceFile

if TYPE_CHECKING:
    from specforge_core.config.run_config import DataSection

_log = logging.getLogger(__name__)

_ROWS_FILE, _PLACES_FILE = "asked.jsonl", "asked.i64"
_SHOWN_SKIPS = 5
"""More would hide the message that follows."""


def write_asked(
    files: Sequence[SourceFile], directory: Path, *, settings: DataSection, most: int | None
) -> Counter[str]:
    """Write the conversations of ``files`` into ``directory``.

    :param most: only the first so many.
    :raises DataError: a row cannot be used and the settings stop there; there is no conversation at all.
    :returns: how many rows were skipped, by reason.
    """
    skipped: Counter[str] = Counter()
    places = array("q", [0])
    with open(_create(directory / _ROWS_FILE), "wb") as file:
        for row in read_rows(files, settings.mapping):
            if most is not None and len(places) > most:
                break
            error = row.error if isinstance(row, BadRow) else _find_problem(row)
            if error is not None:
                _skip(error, settings, skipped)
                continue
            assert isinstance(row, SourceRow)
            places.append(places[-1] + file.write(_encode(row)))
        _sync(file.fileno(), file)
    if len(places) == 1:
        raise DataError("hold no conversation to answer", where="data", hint="rows need messages, or a prompt")
    with open(_create(directory / _PLACES_FILE), "wb") as file:
        file.write(places.tobytes())
        _sync(file.fileno(), file)
    return skipped


def _create(path: Path) -> int:
    return open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _sync(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _find_problem(row: SourceRow) -> DataError | None:
    if row.conversation is None:
        return DataError(
            "holds tokens or rendered text, and no conversation that could be answered",
            where=row.where,
            hint="regenerate from rows with messages; data.on_bad_row=skip leaves such rows out",
        )
    return None


def _skip(error: DataError, settings: DataSection, skipped: Counter[str]) -> None:
    """:raises DataError: the run ends at such a row, or at so many of them."""
    if settings.on_bad_row == "stop":
        raise error
    skipped[error.message] += 1
    if skipped.total() <= _SHOWN_SKIPS:
        _log.warning("%s: skipped: %s", error.where, error.message)
    if skipped.total() > settings.max_bad_rows:
        raise DataError(
            f"{skipped.total()} rows cannot be used, data.max_bad_rows allows {settings.max_bad_rows}; "
            f"the last: {error.message}",
            where=error.where,
            hint=error.hint,
        )


def _encode(row: SourceRow) -> bytes:
    conversation = row.conversation
    assert conversation is not None
    fields = {
        "id": row.prompt_id,
        "messages": list(conversation.messages),
        "tools": list(conversation.tools) if conversation.tools is not None else None,
        "untrained": sorted(conversation.untrained),
        "arguments": dict(conversation.template_arguments),
    }
    return (json.dumps(fields, separators=(",", ":")) + "\n").encode("ascii")


class AskedPrompts:
    """What ``write_asked`` wrote.

    :raises DataError: it was altered.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _ROWS_FILE
        self._places = array("q")
        try:
            with open(open_regular(directory / _PLACES_FILE, os.O_RDONLY), "rb") as file:
                self._places.frombytes(file.read())
            self._file = open(open_regular(self._path, os.O_RDONLY), "rb")  # noqa: SIM115 - closed with this
        except (OSError, ValueError) as error:
            raise self._damaged(str(error)) from error
        ordered = all(a < b for a, b in zip(self._places, self._places[1:], strict=False))
        if (
            not ordered
            or self._places[:1] != array("q", [0])
            or self._places[-1] != os.fstat(self._file.fileno()).st_size
        ):
            raise self._damaged("its places do not fit")

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, index: int) -> tuple[str, Conversation]:
        """The prompt's id and its conversation."""
        start, end = self._places[index], self._places[index + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        try:
            fields = parse_json(line)
            return str(fields["id"]), _conversation(fields)
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"conversation {index}: {error}") from error

    def close(self) -> None:
        self._file.close()

    def _damaged(self, reason: str) -> DataError:
        return DataError(
            f"the conversations to be answered cannot be read: {reason}",
            where=str(self._path),
            hint="delete the directory; what was answered is lost with it",
        )


def _conversation(fields: Mapping[str, Any]) -> Conversation:
    return Conversation(
        list(fields["messages"]),
        tools=fields["tools"],
        untrained=frozenset(fields["untrained"]),
        template_arguments=dict(fields["arguments"]),
    )


def batches_of(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each lease's conversations begin, and how many they are."""
    for first in range(0, count, size):
        yield first, min(size, count - first)
