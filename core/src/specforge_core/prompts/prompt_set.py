# SPDX-License-Identifier: Apache-2.0
"""Prepared prompts on disk: flat arrays that are mapped into memory, so a corpus never becomes Python objects.

A directory of ``input_ids.i32``, ``loss_mask.u8``, ``offsets.i64`` (N + 1 of them), ``prompt_ids.txt`` and
``manifest.json``, which says what each must be. It is written aside and renamed: complete or invisible. Opening it
reads all of it once, at the speed of memory. Last step of the stage; capture, training and bench read it.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest, xxh3_128

from specforge_core.contracts import DataError, Prompt
from specforge_core.contracts.files import open_regular
from specforge_core.prompts.prompt_manifest import (
    ARRAYS,
    IDS_FILE,
    INPUT_IDS_FILE,
    LOSS_MASK_FILE,
    OFFSETS_FILE,
    DamagedPrompts,
    is_prompt_id,
    read_manifest,
)
from specforge_core.prompts.prompt_writer import PromptSetWriter

_CHUNK = 1 << 22
"""Elements that are looked at together: some 30 MB at most, and the calls for each cost nothing beside reading them."""


class PromptSet(Sequence[Prompt]):
    """Prompts of one prepared directory, read lazily. Index order is the order of the sources."""

    def __init__(self, directory: Path, manifest: Mapping[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.num_tokens = int(manifest["tokens"])
        files = {name: self._map(name) for name in ARRAYS}
        self._input_ids = torch.frombuffer(files[INPUT_IDS_FILE], dtype=torch.int32)
        self._loss_mask = torch.frombuffer(files[LOSS_MASK_FILE], dtype=torch.uint8)
        self._offsets = torch.frombuffer(files[OFFSETS_FILE], dtype=torch.int64)
        self._ids = files[IDS_FILE]
        self._id_ends = torch.frombuffer(self._ids, dtype=torch.uint8).eq(ord("\n")).nonzero().flatten()
        self.largest_token_id = 0
        self._check_arrays()
        self._check_ids()
        for mapped in files.values():
            mapped.madvise(
                mmap.MADV_DONTNEED
            )  # what was checked need not stay in memory: it is read again when asked for

    @classmethod
    def open(cls, directory: Path) -> PromptSet:
        """
        :raises DataError: nothing was prepared there, or by another version.
        :raises DamagedPrompts: a file is missing, or is not what was written.
        """
        return cls(directory, read_manifest(directory))

    def _map(self, name: str) -> mmap.mmap:
        """A file as it was checked: another one under its name is not opened afterwards."""
        widths = {INPUT_IDS_FILE: 4, LOSS_MASK_FILE: 1}
        size = widths[name] * self.num_tokens if name in widths else int(self.manifest["sizes"][name])
        size = 8 * (len(self) + 1) if name == OFFSETS_FILE else size
        try:
            with open(open_regular(self.directory / name, os.O_RDONLY), "rb") as file:
                if not 0 < size == os.fstat(file.fileno()).st_size:
                    raise DamagedPrompts(self.directory, f"{name} is missing or not {size} bytes long")
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            reason = f"{name} is missing or not {size} bytes long: {error.strerror}"
            raise DamagedPrompts(self.directory, reason) from error
        digest = xxh3_128()
        with memoryview(mapped) as content:
            for start in range(0, size, _CHUNK):
                digest.update(content[start : start + _CHUNK])
                mapped.madvise(mmap.MADV_DONTNEED, start, min(_CHUNK, size - start))
        if digest.hexdigest() != self.manifest["digests"][name]:
            raise DamagedPrompts(self.directory, f"{name} was altered")
        return mapped

    def _check_arrays(self) -> None:
        for start in range(0, self.num_tokens, _CHUNK):
            ids, mask = self._input_ids[start : start + _CHUNK], self._loss_mask[start : start + _CHUNK]
            if int(ids.min()) < 0 or int(mask.max()) > 1:
                raise DamagedPrompts(self.directory, "a token id is negative, or a mask neither 0 nor 1")
            self.largest_token_id = max(self.largest_token_id, int(ids.max()))
        for start in range(0, len(self), _CHUNK):
            if int(self._offsets[start : start + _CHUNK + 1].diff().min()) < 1:
                raise DamagedPrompts(self.directory, "a prompt ends before it begins")
        if int(self._offsets[0]) != 0 or int(self._offsets[-1]) != self.num_tokens:
            raise DamagedPrompts(self.directory, "its arrays do not belong together")

    def _check_ids(self) -> None:
        """Each id can be one, and no two are the same: by their hashes first, so that not all are in memory."""
        if len(self._id_ends) != len(self) or int(self._id_ends[-1]) != len(self._ids) - 1:
            raise DamagedPrompts(self.directory, "its prompts have no ids, or two have one")
        hashes = array("q", bytes(8 * len(self)))
        for number, prompt_id in self._each_id():
            if not is_prompt_id(prompt_id):
                raise DamagedPrompts(self.directory, f"the id of prompt {number} cannot be one")
            hashes[number] = xxh3_64_intdigest(prompt_id) - (1 << 63)
        ordered = torch.frombuffer(hashes, dtype=torch.int64).sort().values
        twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        alike = [prompt_id for number, prompt_id in self._each_id() if hashes[number] in twice] if twice else []
        if len(set(alike)) != len(alike):
            raise DamagedPrompts(self.directory, "its prompts have no ids, or two have one")

    def _each_id(self) -> Iterator[tuple[int, bytes]]:
        start = 0
        for first in range(0, len(self), _CHUNK):
            for number, end in enumerate(self._id_ends[first : first + _CHUNK].tolist(), start=first):
                yield number, self._ids[start:end]
                start = end + 1

    @property
    def fingerprint(self) -> str:
        """Changes whenever sources, settings or tokenizer would give other prompts."""
        return str(self.manifest["fingerprint"])

    @property
    def origins(self) -> list[dict[str, str]]:
        """Where its sources came from, as far as they say so: commits of the hub, settings of a regeneration."""
        found = [source["origin"] for source in self.manifest["sources"] if isinstance(source.get("origin"), dict)]
        return [dict(origin) for number, origin in enumerate(found) if origin not in found[:number]]

    @property
    def report(self) -> list[dict[str, Any]]:
        """What was counted of each source (``report``); empty where prompts were at hand."""
        return list(self.manifest["report"])

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

    def find(self, prompt_id: str) -> int | None:
        """The number of the prompt with this id; None if there is none."""
        wanted = prompt_id.encode(errors="replace") + b"\n"
        if self._ids[: len(wanted)] == wanted:
            return 0
        at = self._ids.find(b"\n" + wanted)
        return None if at < 0 else int(torch.searchsorted(self._id_ends, at)) + 1

    def lengths(self) -> Tensor:
        """The length of each prompt: int64 [N]."""
        return self._offsets.diff()

    def num_tokens_of(self, index: int) -> int:
        """The length of prompt ``index``, without reading its tokens."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token id stands at a trained position: int64 [V].

        :raises DataError: vocabulary mismatch: a trained token id is not below ``vocab_size``.
        """
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for start in range(0, self.num_tokens, _CHUNK):
            stop = min(start + _CHUNK, self.num_tokens)
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


def write_prompt_set(directory: Path, prompts: Iterable[Prompt], *, fingerprint: str, dropped: int = 0) -> PromptSet:
    """Write prompts that are at hand as a prompt set, complete or not at all.

    :raises DataError: there are none, or one is malformed.
    """
    with PromptSetWriter(directory) as writer:
        for prompt in prompts:
            writer.add(prompt)
        writer.finish(fingerprint=fingerprint, dropped=dropped, details={})
    return PromptSet.open(directory)
