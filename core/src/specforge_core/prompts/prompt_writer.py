# SPDX-License-Identifier: Apache-2.0
"""Writes a prompt set: aside first, then in place of what was there. Complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from xxhash import xxh3_128

from specforge_core.contracts import DataError, Prompt
from specforge_core.prompts.prompt_manifest import (
    ARRAYS,
    IDS_FILE,
    INPUT_IDS_FILE,
    LOSS_MASK_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    is_prompt_id,
    make_manifest,
)


class _DigestedFile:
    """A file that is written from its beginning to its end, and the digest of what was written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = xxh3_128()
        self.size = 0

    @property
    def digest(self) -> str:
        return str(self._digest.hexdigest())

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._file.close()


class PromptSetWriter:
    """Writes a prompt set aside; ``finish`` makes it visible. Leaving the context before that leaves nothing."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[str, _DigestedFile] = {}
        self.prompts = self._tokens = 0
        with _writing(directory):
            if directory.exists() and not (directory / MANIFEST_FILE).is_file() and any(directory.iterdir()):
                raise DataError(
                    "holds other files", where=str(directory), hint="prepared prompts need their own directory"
                )
            directory.parent.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                for name in ARRAYS:
                    self._files[name] = _DigestedFile(self._aside / name)
                self._files[OFFSETS_FILE].write(array("q", [0]).tobytes())
            except BaseException:
                self._discard()
                raise

    def __enter__(self) -> PromptSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, prompt: Prompt) -> None:
        """Append one prompt.

        :raises DataError: it has no tokens, a mask of another length, or an id or token ids that cannot be kept.
        """
        try:
            input_ids, mask, prompt_id = (
                array("i", prompt.input_ids),
                bytes(prompt.loss_mask),
                prompt.prompt_id.encode(),
            )
            fits = 0 < len(input_ids) == len(mask) and max(mask) <= 1 and min(input_ids) >= 0
        except (OverflowError, TypeError, ValueError):
            fits = False
        if not fits or not is_prompt_id(prompt_id):
            hint = "input_ids and loss_mask have one length"
            raise DataError("is not a prompt", where=prompt.prompt_id, hint=hint)
        self._tokens += len(input_ids)
        self.prompts += 1
        with _writing(self._directory):
            self._files[INPUT_IDS_FILE].write(input_ids.tobytes())
            self._files[LOSS_MASK_FILE].write(mask)
            self._files[OFFSETS_FILE].write(array("q", [self._tokens]).tobytes())
            self._files[IDS_FILE].write(prompt_id + b"\n")

    def finish(self, *, fingerprint: str, dropped: int, details: Mapping[str, Any]) -> None:
        """Make the set visible in place of whatever was there.

        :raises DataError: nothing was added.
        """
        if not self.prompts:
            raise DataError(
                f"no prompt has a trained token: {dropped} dropped",
                where=str(self._directory),
                hint="conversations need assistant turns that begin before data.max_length tokens",
            )
        with _writing(self._directory):
            for file in self._files.values():
                file.sync()
            content = {
                "prompts": self.prompts,
                "tokens": self._tokens,
                "sizes": {name: file.size for name, file in self._files.items()},
                "digests": {name: file.digest for name, file in self._files.items()},
                "fingerprint": fingerprint,
                "dropped": dropped,
                **details,
            }
            (self._aside / MANIFEST_FILE).write_text(make_manifest(content), encoding="utf-8")
            _replace(self._aside, self._directory)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"prepared prompts cannot be written: {error.strerror}",
            where=str(directory),
            hint="free space or correct permissions there; nothing partial was kept",
        ) from error


def _replace(aside: Path, directory: Path) -> None:
    """Rename into place. What was there goes first, and comes back if it cannot be replaced; a reader of it keeps its
    mapped files."""
    if not directory.exists():
        os.rename(aside, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    try:
        os.rename(directory, old / "set")
        try:
            os.rename(aside, directory)
        except OSError:
            os.rename(old / "set", directory)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """What preparations that were killed left beside ``directory``. Call while nobody else prepares there."""
    leftover = re.compile(rf"\.{re.escape(directory.name)}\.(old\.)?[a-z0-9_]{{8}}")
    for path in directory.parent.iterdir():
        if leftover.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
