# SPDX-License-Identifier: Apache-2.0
"""Writes a prompt set: into a temporary directory first, then in place of what was there. Complete or not at all."""

from __future__ import annotations

import errno
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
from specforge_core.contracts.files import open_regular
from specforge_core.prompts.prompt_manifest import (
    ARRAYS,
    IDS_FILE,
    INPUT_IDS_FILE,
    LOSS_MASK_FILE,
    MANIFEST_FILE,
    MAX_ID_BYTES,
    OFFSETS_FILE,
    is_prompt_id,
    make_manifest,
)

_CHUNK_BYTES = 1 << 22
"""Digested at once: more is no faster, and memory stays flat."""


class DigestedFile:
    """A file that is written from its beginning to its end, and the digest of what was written.

    :param size: bytes of it that were written before and are kept; the rest is cut off.
    """

    def __init__(self, path: Path, *, size: int = 0) -> None:
        self._file: BinaryIO
        if size:
            self._file = os.fdopen(open_regular(path, os.O_RDWR), "r+b")
        else:
            path.unlink(missing_ok=True)  # a link that somebody put there is not followed
            self._file = path.open("w+b")
        self._digest = xxh3_128()
        self.size = 0
        while self.size < size:
            self._take(self._file.read(min(_CHUNK_BYTES, size - self.size)), size)
        self._file.truncate(size)
        self._file.seek(size)

    def _take(self, content: bytes, size: int) -> None:
        if not content:
            raise OSError(errno.EIO, f"ends before its {size} bytes", self._file.name)
        self._digest.update(content)
        self.size += len(content)

    @property
    def digest(self) -> str:
        return str(self._digest.hexdigest())

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def read(self, at: int, size: int) -> bytes:
        """Some of what was written, for whoever needs it rarely."""
        self._file.flush()
        return os.pread(self._file.fileno(), size, at)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._file.close()


class PromptFiles:
    """The files of a prompt set, appended to in a directory that nobody reads yet.

    :param sizes: of each file what was written before and is kept.
    :raises OSError: they cannot be written, or are shorter than ``sizes``.
    """

    def __init__(self, directory: Path, *, sizes: Mapping[str, int] | None = None):
        self._directory = directory
        self._files: dict[str, DigestedFile] = {}
        try:
            for name in ARRAYS:
                self._files[name] = DigestedFile(directory / name, size=(sizes or {}).get(name, 0))
            if not self._files[OFFSETS_FILE].size:
                self._files[OFFSETS_FILE].write(array("q", [0]).tobytes())
        except BaseException:
            self.close()
            raise
        self.prompts = self._files[OFFSETS_FILE].size // 8 - 1
        self.tokens = self._files[LOSS_MASK_FILE].size

    def append(self, prompt_id: bytes, input_ids: bytes, loss_mask: bytes) -> None:
        """Append one prompt: its id, token ids as int32 and mask as bytes, which are known to belong together."""
        self.tokens += len(loss_mask)
        self.prompts += 1
        self._files[INPUT_IDS_FILE].write(input_ids)
        self._files[LOSS_MASK_FILE].write(loss_mask)
        self._files[OFFSETS_FILE].write(array("q", [self.tokens]).tobytes())
        self._files[IDS_FILE].write(prompt_id + b"\n")

    def read_id(self, at: int) -> bytes:
        """The prompt id that begins at this byte of the ids."""
        return self._files[IDS_FILE].read(at, MAX_ID_BYTES + 1).partition(b"\n")[0]

    def read_offsets(self, first: int, stop: int) -> bytes:
        """Offsets [first, stop), as int64."""
        return self._files[OFFSETS_FILE].read(8 * first, 8 * (stop - first))

    @property
    def sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._files.items()}

    @property
    def digests(self) -> dict[str, str]:
        return {name: file.digest for name, file in self._files.items()}

    def sync(self) -> None:
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def write_manifest(self, *, fingerprint: str, dropped: int, details: Mapping[str, Any]) -> None:
        """Make the directory a prompt set."""
        self.sync()
        content = {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "sizes": self.sizes,
            "digests": self.digests,
            "fingerprint": fingerprint,
            "dropped": dropped,
            **details,
        }
        (self._directory / MANIFEST_FILE).write_text(make_manifest(content), encoding="utf-8")


class PromptSetWriter:
    """Writes prompts that are at hand; ``finish`` makes the set visible. Leaving the context before leaves nothing."""

    def __init__(self, directory: Path):
        self._directory = directory
        with writing(directory):
            check_place(directory)
            self._temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            try:
                self._files = PromptFiles(self._temporary)
            except BaseException:
                shutil.rmtree(self._temporary, ignore_errors=True)
                raise

    def __enter__(self) -> PromptSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._files.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def prompts(self) -> int:
        return self._files.prompts

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
        with writing(self._directory):
            self._files.append(prompt_id, input_ids.tobytes(), mask)

    def finish(self, *, fingerprint: str, dropped: int, details: Mapping[str, Any]) -> None:
        """Make the set visible in place of whatever was there.

        :raises DataError: nothing was added.
        """
        if not self.prompts:
            raise nothing_trained(self._directory, f"{dropped} dropped")
        with writing(self._directory):
            self._files.write_manifest(fingerprint=fingerprint, dropped=dropped, details=details)
            replace_set(self._temporary, self._directory)


def nothing_trained(directory: Path, why: str) -> DataError:
    return DataError(
        f"no prompt has a trained token: {why}",
        where=str(directory),
        hint="conversations need assistant turns that begin before data.max_length tokens",
    )


def check_place(directory: Path) -> None:
    """Make the directory above, too. :raises DataError: there is something else than a prompt set."""
    if directory.exists() and not (directory / MANIFEST_FILE).is_file() and any(directory.iterdir()):
        raise DataError("holds other files", where=str(directory), hint="prepared prompts need their own directory")
    directory.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"prepared prompts cannot be written: {error.strerror}",
            where=str(directory),
            hint="free space or correct permissions there; nothing partial was kept",
        ) from error


def replace_set(temporary: Path, directory: Path) -> None:
    """Rename into place. What was there goes first, and comes back if it cannot be replaced; a reader of it keeps its
    mapped files."""
    if not directory.exists():
        os.rename(temporary, directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    try:
        os.rename(directory, old / "set")
        try:
            os.rename(temporary, directory)
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
