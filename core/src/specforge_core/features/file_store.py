# SPDX-License-Identifier: Apache-2.0
"""Features as files: one safetensors file per sample, in a directory that may be a shared mount.

``<directory>/<two hex digits of the id's hash>/<sample id>.safetensors``. A file is written aside and renamed, so it is
complete or absent; ``delete`` removes it and leaves nothing. What both change (the directory, and the counts of what it
holds) they change under one short lock; tensors are written and read without it. What a process left aside that was
killed is removed by the next one to open the store.

On mounts of several machines: a file of another machine's is taken for abandoned only after an hour, since some mounts
keep locks to each machine; a file that vanishes while it is read was deleted or replaced.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts import (
    FeatureCorrupt,
    FeatureGone,
    FeatureSpec,
    FeatureStore,
    PartContext,
    Sample,
    SampleRef,
    SpecForgeError,
    StaleRef,
    StoreError,
    StoreFull,
    Usage,
    describe_sample,
)
from specforge_core.contracts.files import sync_directory
from specforge_core.features.identity import file_name_problem
from specforge_core.features.sample_file import check_length, encode_sample, read_features, read_header
from specforge_core.features.store_access import claim_or_attach
from specforge_core.features.store_aside import Aside, AsideFile
from specforge_core.features.store_counts import Counts, StoreCounts

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import FileStoreConfig

_SUFFIX = ".safetensors"
_MOST_UNSYNCED = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class _Held:
    """The file that is in a sample's place now; generation 0 where it cannot be read."""

    nbytes: int
    generation: int


class FileStore(FeatureStore):
    """Samples as files. Any number of processes may open one directory; their counts and capacity are one.

    What was put survives its process at once, and a power cut after ``sync`` or ``close``.
    """

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        self._name = config.name
        self._directory = config.path or context.directory / "store"
        self._capacity_bytes = config.capacity_bytes
        self._counts = StoreCounts(self._directory)
        self._aside = Aside(self._directory)
        self._closed = False
        self._unsynced: dict[Path, None] = {}
        self._unsynced_lock, self._syncing = threading.Lock(), threading.Lock()
        with _reporting(self._directory, "opened"):
            claim_or_attach(self._directory, token=context.token, holds_samples=any(self._sizes()))
            if self._directory.is_dir():
                self._recover()

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        self._refuse_closed()
        place = self._place(sample_id)
        ref = describe_sample(sample_id, sample, store=self._name)
        content = encode_sample(sample_id, sample)
        with _reporting(place, "written"):
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._aside.open() as aside:
                ref = replace(ref, generation=self._reserve(place, aside, content.nbytes))
                try:
                    content.write(aside.descriptor, ref.generation)
                    self._move_into_place(place, aside, ref.generation)
                except BaseException:
                    self._give_up(aside)
                    raise
            self._remember(place)
        return ref

    def get(self, ref: SampleRef) -> Sample:
        self._refuse_closed()
        place = self._place(ref.sample_id)
        where = str(place)
        with ExitStack() as opened:
            try:
                descriptor = _open(place, opened)
            except OSError as error:
                raise StoreError(f"{ref.sample_id} cannot be read: {error.strerror}", where=where) from error
            if descriptor is None:
                raise FeatureGone(f"{ref.sample_id} was deleted, or never put here", where=where, hint=_GONE)
            try:
                return _read(ref, descriptor, where)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise FeatureGone("deleted or replaced while it was read", where=where, hint=_GONE) from error
                raise FeatureCorrupt(f"{ref.sample_id} cannot be read: {error.strerror}", where=where) from error

    def delete(self, ref: SampleRef) -> None:
        self._refuse_closed()
        place = self._place(ref.sample_id)
        with _reporting(place, "deleted"), ExitStack() as opened:
            if _open(place, opened) is None:
                return
            with self._counts.locked() as counts:
                held = _look(place, opened)
                if held is None or held.generation not in (ref.generation, 0):
                    return
                place.unlink()
                counts.samples, counts.nbytes = counts.samples - 1, counts.nbytes - held.nbytes

    def sync(self) -> None:
        with self._syncing, _reporting(self._directory, "synced"):
            with self._unsynced_lock:
                places, self._unsynced = self._unsynced, {}
            for place in places:
                _sync(place)
            for directory in {place.parent for place in places}:
                sync_directory(directory)
            if places:
                sync_directory(self._directory)

    def usage(self) -> Usage:
        with _reporting(self._directory, "read"):
            return Usage(*self._counts.read(), self._capacity_bytes)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.sync()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError("this file store was closed", where=str(self._directory))

    def _place(self, sample_id: str) -> Path:
        problem = file_name_problem(sample_id)
        if problem:
            raise StoreError(f"sample id {sample_id[:80]!r} cannot name a file: {problem}", where=str(self._directory))
        digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=1).hexdigest()
        return self._directory / digest / (sample_id + _SUFFIX)

    def _reserve(self, place: Path, aside: AsideFile, nbytes: int) -> int:
        """Room for a file that replaces what is in its place; the generation it gets.

        From here on its size counts, and is the size of what is aside.

        :raises StoreFull: before anything is written.
        """
        with ExitStack() as opened, self._counts.locked() as counts:
            held = _look(place, opened)
            growth = nbytes - (held.nbytes if held else 0)
            if self._capacity_bytes is not None and counts.nbytes + growth > self._capacity_bytes:
                self._count_again(counts)  # a process that was killed may have left it too high
                if counts.nbytes + growth > self._capacity_bytes:
                    raise StoreFull(
                        f"{nbytes} bytes do not fit: {counts.nbytes} of {self._capacity_bytes} are taken",
                        where=str(place),
                        hint="raise store.capacity_bytes or lower capture.high_watermark_windows",
                    )
            generation = counts.next_generation(held.generation if held else 0)
            with counts.announced(nbytes=nbytes):
                os.ftruncate(aside.descriptor, nbytes)
            return generation

    def _move_into_place(self, place: Path, aside: AsideFile, generation: int) -> None:
        with ExitStack() as opened, self._counts.locked() as counts:
            held = _look(place, opened)
            if held is not None and held.generation > generation:
                counts.nbytes -= aside.remove()  # put again meanwhile: it was replaced before it was there
                return
            with counts.announced(samples=0 if held else 1):
                aside.path.replace(place)
            counts.nbytes -= held.nbytes if held else 0

    def _give_up(self, aside: AsideFile) -> None:
        with self._counts.locked() as counts:
            counts.nbytes -= aside.remove()

    def _remember(self, place: Path) -> None:
        with self._unsynced_lock:
            self._unsynced[place] = None
            many = len(self._unsynced) > _MOST_UNSYNCED
        if many:
            self.sync()

    def _recover(self) -> None:
        """Remove what killed processes left, and count what is here."""
        try:
            with self._counts.locked() as counts:
                counts.begin_block()
                self._count_again(counts)
        except OSError as error:
            if error.errno not in _READ_ONLY:  # features that were put elsewhere can be read from such a mount
                raise

    def _count_again(self, counts: Counts) -> None:
        aside = self._aside.sweep(counts.clock())
        sizes = list(self._sizes())
        counts.samples, counts.nbytes = len(sizes), sum(sizes) + aside

    def _sizes(self) -> Iterator[int]:
        """Of every sample's file."""
        for path in self._directory.glob(f"[0-9a-f][0-9a-f]/*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                yield path.stat().st_size


def _open(path: Path, opened: ExitStack) -> int | None:
    """A descriptor that ``opened`` closes; None: there is no such file."""
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            # A network mount may remember for a while that there was none. Opening the directory makes it ask again.
            with suppress(FileNotFoundError):
                os.close(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY))
        else:
            opened.callback(os.close, descriptor)
            return descriptor
    return None


def _sync(place: Path) -> None:
    """Nothing where the sample was deleted since."""
    with ExitStack() as opened:
        descriptor = _open(place, opened)
        if descriptor is not None:
            os.fsync(descriptor)


def _look(place: Path, opened: ExitStack) -> _Held | None:
    """What is in a sample's place. Its blocks are freed when ``opened`` ends, not in the directory's lock."""
    descriptor = _open(place, opened)
    if descriptor is None:
        return None
    try:
        generation = read_header(descriptor, where=str(place)).generation
    except FeatureCorrupt:
        generation = 0
    return _Held(os.fstat(descriptor).st_size, generation)


def _read(ref: SampleRef, descriptor: int, where: str) -> Sample:
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


@contextmanager
def _reporting(path: Path, done: str) -> Iterator[None]:
    """Turn what the file system refuses into a message the user can act on."""
    try:
        yield
    except SpecForgeError:  # AccessDenied is a PermissionError, and says more than one
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            hint = "free space there; nothing partial was kept"
            raise StoreFull(f"cannot be {done}: {error.strerror}", where=str(path), hint=hint) from error
        raise StoreError(f"cannot be {done}: {error.strerror}", where=str(path), hint="check store.path") from error


_GONE = "if training did not free it, remove the feature directory and run `specforge capture` again"
