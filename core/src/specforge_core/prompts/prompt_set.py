# SPDX-License-Identifier: Apache-2.0
"""Prepared prompts on disk: flat arrays that are mapped into memory, so a corpus never becomes Python objects.

A directory of ``input_ids.i32``, ``loss_mask.u8``, ``offsets.i64`` (N + 1 of them), ``prompt_ids.txt`` and
``manifest.json``, which says how large each must be. It is written aside and renamed: complete or invisible.
Last step of the stage; capture, training and bench read it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, overload

import torch
from torch import Tensor

from specforge_core.contracts import DataError, Prompt

FORMAT = 1
INPUT_IDS_FILE, LOSS_MASK_FILE, OFFSETS_FILE = "input_ids.i32", "loss_mask.u8", "offsets.i64"
IDS_FILE, MANIFEST_FILE = "prompt_ids.txt", "manifest.json"
_ARRAYS = (INPUT_IDS_FILE, LOSS_MASK_FILE, OFFSETS_FILE, IDS_FILE)
_COUNT_CHUNK = 1 << 22


class PromptSet(Sequence[Prompt]):
    """Prompts of one prepared directory, read lazily. Index order is the order of the sources."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.num_tokens = int(manifest["tokens"])
        self._input_ids = torch.from_file(
            str(directory / INPUT_IDS_FILE), shared=False, size=self.num_tokens, dtype=torch.int32
        )
        self._loss_mask = torch.from_file(
            str(directory / LOSS_MASK_FILE), shared=False, size=self.num_tokens, dtype=torch.uint8
        )
        self._offsets = torch.from_file(
            str(directory / OFFSETS_FILE), shared=False, size=int(manifest["prompts"]) + 1, dtype=torch.int64
        )
        self._ids = (directory / IDS_FILE).read_bytes()
        ends = torch.frombuffer(bytearray(self._ids), dtype=torch.uint8).eq(ord("\n")).nonzero().flatten()
        self._id_ends = ends
        if len(ends) != len(self) or int(self._offsets[0]) != 0 or int(self._offsets[-1]) != self.num_tokens:
            raise _damaged(directory, "its arrays do not belong together")

    @classmethod
    def open(cls, directory: Path) -> PromptSet:
        """:raises DataError: nothing was prepared there, or files are missing, short or of another version."""
        manifest = read_manifest(directory)
        for name, size in manifest["sizes"].items():
            path = directory / name
            if not path.is_file() or path.stat().st_size != size:
                raise _damaged(directory, f"{name} is missing or not {size} bytes long")
        return cls(directory, manifest)

    @property
    def fingerprint(self) -> str:
        """Changes whenever sources, settings or tokenizer would give other prompts."""
        return str(self.manifest["fingerprint"])

    @property
    def dropped(self) -> int:
        """Rows left out because no token of theirs is trained."""
        return int(self.manifest["dropped"])

    def __len__(self) -> int:
        return int(self.manifest["prompts"])

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt_id = self.prompt_id(index)
        start, stop = self._offsets[index % len(self) : index % len(self) + 2].tolist()
        return Prompt(prompt_id, self._input_ids[start:stop].tolist(), self._loss_mask[start:stop].tolist())

    def __iter__(self) -> Iterator[Prompt]:
        return (self[index] for index in range(len(self)))

    def prompt_id(self, index: int) -> str:
        """The id of prompt ``index``, without reading its tokens."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        index %= len(self)
        start = int(self._id_ends[index - 1]) + 1 if index else 0
        return self._ids[start : int(self._id_ends[index])].decode()

    def num_tokens_of(self, index: int) -> int:
        """The length of prompt ``index``, without reading its tokens."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token id stands at a trained position: int64 [V].

        :raises DataError: vocabulary mismatch: a trained token id is not below ``vocab_size``.
        """
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for start in range(0, self.num_tokens, _COUNT_CHUNK):
            stop = min(start + _COUNT_CHUNK, self.num_tokens)
            trained = self._input_ids[start:stop][self._loss_mask[start:stop].bool()]
            counted = torch.bincount(trained, minlength=vocab_size)
            if len(counted) > vocab_size:
                raise DataError(
                    f"vocabulary mismatch: token id {len(counted) - 1} in a vocabulary of {vocab_size}",
                    where=str(self.directory),
                    hint="prepare the prompts with this target's tokenizer",
                )
            counts += counted
        return counts


class PromptSetWriter:
    """Writes a prompt set aside; ``finish`` makes it visible. Leaving the context before that leaves nothing."""

    def __init__(self, directory: Path):
        self._directory = directory
        if directory.exists() and not (directory / MANIFEST_FILE).is_file() and any(directory.iterdir()):
            raise DataError("holds other files", where=str(directory), hint="prepared prompts need their own directory")
        with _writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
            self._files: dict[str, BinaryIO] = {name: (self._aside / name).open("wb") for name in _ARRAYS}
            array("q", [0]).tofile(self._files[OFFSETS_FILE])
        self.prompts = self._tokens = 0

    def __enter__(self) -> PromptSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what could not be written has been said, and goes now
                file.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, prompt: Prompt) -> None:
        """Append one prompt.

        :raises DataError: it has no tokens, a mask of another length, or an id that cannot be kept.
        """
        if not prompt.num_tokens or prompt.num_tokens != len(prompt.loss_mask) or "\n" in prompt.prompt_id:
            raise DataError("is not a prompt", where=prompt.prompt_id, hint="input_ids and loss_mask have one length")
        self._tokens += prompt.num_tokens
        self.prompts += 1
        with _writing(self._directory):
            array("i", prompt.input_ids).tofile(self._files[INPUT_IDS_FILE])
            self._files[LOSS_MASK_FILE].write(bytes(prompt.loss_mask))
            array("q", [self._tokens]).tofile(self._files[OFFSETS_FILE])
            self._files[IDS_FILE].write(prompt.prompt_id.encode() + b"\n")

    def finish(self, *, fingerprint: str, dropped: int, details: Mapping[str, Any]) -> PromptSet:
        """Make the set visible in place of whatever was there, and open it.

        :raises DataError: nothing was added.
        """
        if not self.prompts:
            raise DataError(
                f"no prompt has a trained token: {dropped} dropped",
                where=str(self._directory),
                hint="conversations need assistant turns that begin before data.max_length tokens",
            )
        with _writing(self._directory):
            self._write_manifest({"fingerprint": fingerprint, "dropped": dropped, **details})
            _replace(self._aside, self._directory)
        return PromptSet.open(self._directory)

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        manifest = {
            "format": FORMAT,
            "byteorder": sys.byteorder,
            "prompts": self.prompts,
            "tokens": self._tokens,
            "sizes": {name: (self._aside / name).stat().st_size for name in _ARRAYS},
            **content,
        }
        (self._aside / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write_prompt_set(directory: Path, prompts: Iterable[Prompt], *, fingerprint: str, dropped: int = 0) -> PromptSet:
    """Write prompts that are at hand as a prompt set, complete or not at all.

    :raises DataError: there are none, or one is malformed.
    """
    with PromptSetWriter(directory) as writer:
        for prompt in prompts:
            writer.add(prompt)
        return writer.finish(fingerprint=fingerprint, dropped=dropped, details={})


def read_manifest(directory: Path) -> dict[str, Any]:
    """:raises DataError: nothing was prepared there, or by another version."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise DataError("holds no prepared prompts", where=str(directory), hint="prepare them again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{MANIFEST_FILE} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("byteorder")) != (FORMAT, sys.byteorder):
        raise _damaged(directory, "it was written by another version or on another kind of machine")
    return manifest


def _damaged(directory: Path, reason: str) -> DataError:
    return DataError(
        f"the prepared prompts cannot be used: {reason}", where=str(directory), hint="delete the directory"
    )


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
    """Rename into place. What was there goes first; a reader of it keeps its mapped files."""
    if directory.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
        os.rename(directory, old / "set")
        os.rename(aside, directory)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, directory)
