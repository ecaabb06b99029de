# SPDX-License-Identifier: Apache-2.0
"""The elements of one long JSON array, each parsed as soon as it is there: the array itself is never in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from specforge_core.contracts import DataError
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value
from specforge_core.prompts.reading.raw_rows import MAX_ROW_BYTES, too_long

_CHUNK = 64 << 10
"""Read at once: several rows, so that most rows need one read."""
_SPACES = re.compile(r"[ \t\n\r]*")
_NEAR_END = 16
"""Characters: an error so near the end of what was read may only mean that the rest is not there yet."""
_HINT = "the file begins as a JSON array: one array of objects, and nothing after it"


class ArrayReader:
    """Reads one file once.

    :ivar size: of the last element, in characters.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self._text = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._at = 0
        self._ended = False
        self._twice = ""
        self.size = 0
        self._parse = json.JSONDecoder(object_pairs_hook=self._note_twice).raw_decode

    def elements(self) -> Iterator[tuple[int, Any, str]]:
        """Number from 1, value, and what is wrong with an element after which the array can be read on.

        :raises DataError: it is not JSON from here on, or an element is longer than a row may be.
        """
        self._expect("[", 0)
        if self._next(0) == "]":
            self._at += 1
            return self._check_end(0)
        number = 0
        while True:
            number += 1
            self._twice = ""
            value = self._element(number)
            yield number, value, self._twice
            if self._next(number) == "]":
                self._at += 1
                return self._check_end(number)
            self._expect(",", number)

    def _where(self, number: int) -> str:
        return f"{self._name}:{number}" if number else self._name

    def _refuse(self, reason: str, number: int) -> DataError:
        return DataError(f"is not JSON: {reason[:SAID_CHARACTERS]}", where=self._where(number), hint=_HINT)

    def _note_twice(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._twice = f"is not JSON: key {show_value(repeated)} stands twice"
        return made

    def _read(self, number: int) -> None:
        """More text, as much again as there is, so that a long element is not parsed from its start too often."""
        piece = self._file.read(max(_CHUNK, len(self._buffer) - self._at))
        try:
            self._buffer = self._buffer[self._at :] + self._text.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            raise DataError("is not UTF-8", where=self._where(number), hint="convert the file to UTF-8") from error
        self._at = 0
        self._ended = not piece

    def _next(self, number: int) -> str:
        """The next character that is no space, not taken yet; empty at the end of the file."""
        skipped = 0
        while True:
            begin = self._at
            self._at = _SPACES.match(self._buffer, begin).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            skipped += self._at - begin
            if skipped > MAX_ROW_BYTES:
                raise self._refuse(f"{skipped} spaces one after the other", number)
            if self._ended:
                return ""
            self._read(number)

    def _expect(self, wanted: str, number: int) -> None:
        found = self._next(number)
        if found != wanted:
            what = f"{show_value(found)} stands" if found else "the file ends"
            raise self._refuse(f"{what} where {wanted!r} or the end of the array should", number)
        self._at += 1

    def _element(self, number: int) -> Any:
        if not self._next(number):
            raise self._refuse("the file ends inside the array", number)
        while True:
            try:
                value, end = self._parse(self._buffer, self._at)
                if end < len(self._buffer) or self._ended:  # a number could go on
                    self._check_length(end - self._at, number)
                    self.size, self._at = end - self._at, end
                    return value
            except RecursionError as error:
                raise self._refuse("nested too deeply", number) from error
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    raise self._refuse(error.msg, number) from error
            except ValueError as error:
                raise self._refuse(str(error), number) from error
            self._check_length(len(self._buffer) - self._at, number)
            self._read(number)

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - _NEAR_END

    def _check_length(self, length: int, number: int) -> None:
        if length > MAX_ROW_BYTES:
            raise too_long(self._where(number))

    def _check_end(self, number: int) -> None:
        found = self._next(number)
        if found:
            raise self._refuse(f"{show_value(found)} stands after the end of the array", number)
