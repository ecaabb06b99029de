# SPDX-License-Identifier: Apache-2.0
"""A prompt set that is being written, and how far it is: what a killed preparation leaves and the next goes on from.

``.NAME.partial`` beside the set's place holds the files so far, where each prompt came from, and ``progress.json``,
which says every few seconds what of them is surely on the disk. What was appended later is cut off and done again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from xxhash import xxh3_128_hexdigest

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular, read_json_object, refuse_link, replace_file
from specforge_core.prompts.id_table import IdTable
from specforge_core.prompts.prompt_manifest import IDS_FILE, REJECTS_FILE
from specforge_core.prompts.prompt_writer import DigestedFile, PromptFiles, check_place, replace_set, writing
from specforge_core.prompts.row_encoder import Sample

_log = logging.getLogger(__name__)

_FORMAT = 1
_PROGRESS_FILE, _PLACES_FILE, _SET = "progress.json", "places.i64", "set"
_LENGTHS = 1 << 16
"""Offsets read at once: half a megabyte."""
_PLACE_BYTES = 24
"""Of each prompt: which source, which row of it, and where its id stands."""


def remove_partial(directory: Path) -> None:
    """What a killed preparation left, where the set itself is there."""
    shutil.rmtree(_partial_of(directory), ignore_errors=True)


def _partial_of(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.partial"


def _digest(fields: Mapping[str, Any]) -> str:
    return str(xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode()))


class PartialSet:
    """Appended to, saved now and then, and finished once.

    Left with a ``DataError``, or before it was saved, nothing stays; left otherwise, what was saved stays.

    :param key: what the set is made of; a partial set of anything else is removed.
    """

    def __init__(self, directory: Path, *, key: str) -> None:
        self._directory, self._key = directory, key
        self._partial = _partial_of(directory)
        with writing(directory):
            check_place(directory)
            saved = self._find()
            try:
                self._open(saved)
            except OSError:
                if saved is None:
                    raise
                _log.warning("%s: is damaged; prompts are prepared from the first row on", self._partial)
                saved = None
                self._open(None)
        self._saved = saved is not None
        self.state: Mapping[str, Any] = saved["state"] if saved is not None else {}

    def _find(self) -> dict[str, Any] | None:
        """What was saved of this very set."""

        def refuse(reason: str) -> DataError:
            return DataError(reason, where=str(self._partial))

        try:
            refuse_link(self._partial)
            saved = read_json_object(self._partial / _PROGRESS_FILE, refuse=refuse)
        except DataError:
            return None
        ours = (saved.get("format"), saved.get("key")) == (_FORMAT, self._key)
        return saved if ours and saved.pop("digest", None) == _digest(saved) else None

    def _open(self, saved: Mapping[str, Any] | None) -> None:
        """:raises OSError: there is no room, or what was saved is not there any more."""
        if saved is None:
            self._discard()
            (self._partial / _SET).mkdir(parents=True)
        sizes = {} if saved is None else saved["sizes"]
        places = {_PLACES_FILE: self._partial, REJECTS_FILE: self._partial / _SET}
        with ExitStack() as opened:
            if saved is None:
                opened.callback(self._discard)
            self._files = PromptFiles(self._partial / _SET, sizes=sizes)
            opened.callback(self._files.close)
            self._others: dict[str, DigestedFile] = {}
            for name, place in places.items():
                self._others[name] = DigestedFile(place / name, size=sizes.get(name, 0))
                opened.callback(self._others[name].close)
            if saved is not None and saved["digests"] != self._digests():
                raise OSError("its files are not what was saved")
            opened.pop_all()
        self._ids = IdTable(self._written)
        with open(open_regular(self._partial / _SET / IDS_FILE, os.O_RDONLY), "rb") as written:
            for line in written:
                self._ids.add(line.removesuffix(b"\n"))

    def _digests(self) -> dict[str, str]:
        return {**self._files.digests, **{name: file.digest for name, file in self._others.items()}}

    def __enter__(self) -> PartialSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()
        if not self._saved or kind is None or issubclass(kind, DataError):
            self._discard()

    def _close(self) -> None:
        self._files.close()
        for file in self._others.values():
            file.close()

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def restart(self) -> None:
        """Forget what was saved: it was made otherwise."""
        self._close()
        with writing(self._directory):
            self._open(None)
        self._saved, self.state = False, {}

    @property
    def prompts(self) -> int:
        return self._files.prompts

    def lengths(self, first: int, stop: int) -> Iterator[int]:
        """Tokens of each prompt [first, stop)."""
        for begin in range(first, stop, _LENGTHS):
            offsets = array("q", self._files.read_offsets(begin, min(begin + _LENGTHS, stop) + 1))
            yield from (after - before for before, after in pairwise(offsets))

    def find(self, prompt_id: bytes) -> tuple[int, int] | None:
        """Source and row of the prompt that has this id; None if there is none."""
        number = self._ids.find(prompt_id)
        return None if number is None else self._place(number)[:2]

    def add(self, sample: Sample, source: int, row: int) -> None:
        """Append a sample whose id ``find`` does not find."""
        with writing(self._directory):
            self._others[_PLACES_FILE].write(array("q", [source, row, self._files.sizes[IDS_FILE]]).tobytes())
            self._files.append(sample.prompt_id, sample.input_ids, sample.loss_mask)
        self._ids.add(sample.prompt_id)

    def reject(self, entry: Mapping[str, Any]) -> None:
        """Append to the rows that could not be used."""
        with writing(self._directory):
            self._others[REJECTS_FILE].write(json.dumps(entry).encode() + b"\n")

    def save(self, state: Mapping[str, Any]) -> None:
        """All that was appended is on the disk, and belongs to ``state``."""
        with writing(self._directory):
            self._files.sync()
            for file in self._others.values():
                file.sync()
            sizes = {**self._files.sizes, **{name: file.size for name, file in self._others.items()}}
            saved = {"format": _FORMAT, "key": self._key, "sizes": sizes, "digests": self._digests(), "state": state}
            replace_file(self._partial / _PROGRESS_FILE, json.dumps(saved | {"digest": _digest(saved)}).encode())
        self._saved = True

    def finish(self, *, fingerprint: str, dropped: int, details: Mapping[str, Any]) -> None:
        """Make the set visible in place of whatever was there."""
        with writing(self._directory):
            self._others[REJECTS_FILE].sync()
            if not self._others[REJECTS_FILE].size:
                (self._partial / _SET / REJECTS_FILE).unlink()
            self._files.write_manifest(fingerprint=fingerprint, dropped=dropped, details=details)
            replace_set(self._partial / _SET, self._directory)

    def _place(self, number: int) -> tuple[int, int, int]:
        content = self._others[_PLACES_FILE].read(number * _PLACE_BYTES, _PLACE_BYTES)
        source, row, at = array("q", content)
        return source, row, at

    def _written(self, number: int) -> bytes:
        return self._files.read_id(self._place(number)[2])
