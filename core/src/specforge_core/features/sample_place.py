# SPDX-License-Identifier: Apache-2.0
"""Where one sample's file is: a folder of the store, held open, and a name in it.

Others may write into the directory of a store. Neither folder nor file is reached through a link, so whatever was
planted there, nothing outside of the directory is read, written or removed; what is no regular file is not a sample.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from specforge_core.contracts import FeatureCorrupt, FeatureSpec, Sample, SampleRef, StaleRef
from specforge_core.contracts.files import make_directory, open_directory, open_regular
from specforge_core.features.sample_file import MAX_GENERATION, check_length, read_features, read_header
from specforge_core.features.store_aside import AsideFile

SUFFIX = ".safetensors"
_FOLDER = re.compile("[0-9a-f]{2}")
_BELIEVED_GENERATION = MAX_GENERATION // 2
"""A put gets a generation above that of the file in its place. One that was planted there leaves as many again."""


@dataclass(frozen=True, slots=True)
class Held:
    """The file that is in a sample's place now; generation 0 where it cannot be read, or believed."""

    nbytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class SamplePlace:
    """
    :param path: for messages.
    :param folder: the open folder; None where it is not there, and so no sample.
    """

    path: Path
    folder: int | None

    def open(self, opened: ExitStack) -> int | None:
        """A descriptor that ``opened`` closes; None: there is no such file.

        :raises FeatureCorrupt: what is there is no file.
        """
        try:
            descriptor = open_regular(self.path.name, os.O_RDONLY, dir_fd=self.folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO):
                hint = "find out who put it there; remove it"
                raise FeatureCorrupt(error.strerror or "is no file", where=str(self.path), hint=hint) from error
            raise
        opened.callback(os.close, descriptor)
        return descriptor

    def is_taken(self) -> bool:
        """Whether anything is there; asked without opening it."""
        try:
            return self.folder is not None and bool(os.stat(self.path.name, dir_fd=self.folder, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def look(self, opened: ExitStack) -> Held | None:
        """What is in the place. Its blocks are freed when ``opened`` ends, not in the directory's lock."""
        if self.folder is None:
            return None
        try:
            descriptor = self.open(opened)
        except FeatureCorrupt:
            return None  # it is not counted, and a put replaces it
        if descriptor is None:
            return None
        try:
            generation = read_header(descriptor, where=str(self.path)).generation
        except FeatureCorrupt:
            generation = 0
        return Held(os.fstat(descriptor).st_size, generation if generation <= _BELIEVED_GENERATION else 0)

    def replace_by(self, aside: AsideFile) -> None:
        os.replace(aside.name, self.path.name, src_dir_fd=aside.folder, dst_dir_fd=self.folder)

    def remove(self) -> None:
        os.unlink(self.path.name, dir_fd=self.folder)

    def sync(self) -> None:
        """Nothing where the sample was deleted since."""
        if self.folder is None:
            return
        with ExitStack() as opened:
            descriptor = self.open(opened)
            if descriptor is not None:
                os.fsync(descriptor)


@contextmanager
def opened_place(path: Path, *, make: bool = False) -> Iterator[SamplePlace]:
    """The place of a sample, its folder open. Opening it makes a network mount ask again for what was not there.

    :param make: the folder, where it is not there.
    :raises OSError: a link or a file is in the folder's place.
    """
    if make:
        make_directory(path.parent)
    try:
        folder = open_directory(path.parent)
    except FileNotFoundError:
        yield SamplePlace(path, None)
        return
    try:
        yield SamplePlace(path, folder)
    finally:
        os.close(folder)


def sample_sizes(directory: Path) -> Iterator[int]:
    """Of every sample's file in a store. What is no folder or no file of ours is passed over."""
    try:
        folders = [name for name in os.listdir(directory) if _FOLDER.fullmatch(name)]
    except FileNotFoundError:
        return
    for name in folders:
        try:
            yield from _sizes_in(directory / name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise


def _sizes_in(path: Path) -> list[int]:
    """:raises OSError: it is a link, or a file."""
    folder = open_directory(path)
    try:
        found = [_size(name, folder) for name in os.listdir(folder) if name.endswith(SUFFIX)]
    finally:
        os.close(folder)
    return [size for size in found if size is not None]


def _size(name: str, folder: int) -> int | None:
    """None: it is gone, or no regular file."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def read_sample(ref: SampleRef, descriptor: int, where: str) -> Sample:
    """What ``ref`` describes, from its open file.

    :raises StaleRef: the file is of another generation.
    :raises FeatureCorrupt: it holds something else, or is damaged.
    """
    header = read_header(descriptor, where=where)
    check_length(descriptor, header, where=where)
    if header.sample_id == ref.sample_id and header.generation != ref.generation:
        raise StaleRef(f"generation {ref.generation} was replaced by {header.generation}", where=where)
    described = (ref.sample_id, ref.prompt_id, ref.epoch, _by_name(ref.features))
    if (header.sample_id, header.prompt_id, header.epoch, _by_name(header.specs)) != described:
        raise FeatureCorrupt("the file does not hold what the ref describes", where=where)
    features = read_features(descriptor, header, where=where)
    return Sample(header.prompt_id, header.epoch, features, header.norm)


def _by_name(specs: tuple[FeatureSpec, ...]) -> list[FeatureSpec]:
    return sorted(specs, key=lambda spec: spec.name)
