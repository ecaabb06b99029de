# SPDX-License-Identifier: Apache-2.0
"""Features as files: one safetensors file per sample, in a directory that may be a shared mount.

``<directory>/<two hex digits of the id's hash>/<sample id>.safetensors``. A file is written aside and renamed, so it is
complete or absent; ``delete`` removes it and leaves nothing. What both change (the directory, and the counts of what it
holds) they change under one short lock; tensors are written and read without it. What a process left aside that was
killed is removed by the next one to open the store.

On mounts of several machines: a file of another machine's is taken for abandoned only after an hour, since some mounts
keep locks to each machine; a file that vanishes while it is read was deleted or replaced.

Others may write into the directory: nothing in it is reached through a link, and what is not a file of ours is passed
over, replaced by a put, or an error that names it. Who may write there can still destroy what is there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts import (
    FeatureCorrupt,
    FeatureGone,
    FeatureStore,
    PartContext,
    Sample,
    SampleRef,
    SpecForgeError,
    StoreError,
    StoreFull,
    Usage,
    describe_sample,
)
from specforge_core.contracts.files import sync_directory
from specforge_core.features.identity import file_name_problem
from specforge_core.features.sample_file import encode_sample
from specforge_core.features.sample_place import SUFFIX, SamplePlace, opened_place, read_sample, sample_sizes
from specforge_core.features.shared_directory import SharedDirectory
from specforge_core.features.store_access import claim_or_attach
from specforge_core.features.store_aside import Aside, AsideFile
from specforge_core.features.store_counts import Counts, StoreCounts

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import FileStoreConfig

_MOST_UNSYNCED = 4096
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class FileStore(FeatureStore):
    """Samples as files. Any number of processes may open one directory; their counts and capacity are one.

    What was put survives its process at once, and a power cut after ``sync`` or ``close``.
    """

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        self._name = config.name
        directory = SharedDirectory(config.path, default=context.directory / "store", holds="features")
        self._directory = directory.path
        self._capacity_bytes = config.capacity_bytes
        self._counts = StoreCounts(self._directory)
        self._aside = Aside(self._directory)
        self._closed = False
        self._unsynced: dict[Path, None] = {}
        self._unsynced_lock, self._syncing = threading.Lock(), threading.Lock()
        with _reporting(self._directory, "opened"):
            directory.check()
            claim_or_attach(self._directory, token=context.token, holds_samples=any(sample_sizes(self._directory)))
            if self._directory.is_dir():
                self._recover()

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        self._refuse_closed()
        path = self._path(sample_id)
        ref = describe_sample(sample_id, sample, store=self._name)
        content = encode_sample(sample_id, sample)
        with _reporting(path, "written"), opened_place(path, make=True) as place, self._aside.open() as aside:
            ref = replace(ref, generation=self._reserve(place, aside, content.nbytes))
            try:
                content.write(aside.descriptor, ref.generation)
                self._move_into_place(place, aside, ref.generation)
            except BaseException:
                self._give_up(aside)
                raise
            self._remember(path)
        return ref

    def get(self, ref: SampleRef) -> Sample:
        self._refuse_closed()
        path = self._path(ref.sample_id)
        with _reporting(path, "read"), opened_place(path) as place, ExitStack() as opened:
            descriptor = place.open(opened)
            if descriptor is None:
                raise FeatureGone(f"{ref.sample_id} was deleted, or never put here", where=str(path), hint=_GONE)
            try:
                return read_sample(ref, descriptor, str(path))
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise FeatureGone("deleted or replaced while it was read", where=str(path), hint=_GONE) from error
                raise FeatureCorrupt(f"{ref.sample_id} cannot be read: {error.strerror}", where=str(path)) from error

    def delete(self, ref: SampleRef) -> None:
        self._refuse_closed()
        path = self._path(ref.sample_id)
        with _reporting(path, "deleted"), opened_place(path) as place, ExitStack() as opened:
            if not place.is_taken():
                return
            with self._locked() as counts:
                held = place.look(opened)
                if held is None or held.generation not in (ref.generation, 0):
                    return
                place.remove()
                counts.samples, counts.nbytes = counts.samples - 1, counts.nbytes - held.nbytes

    def sync(self) -> None:
        with self._syncing, _reporting(self._directory, "synced"):
            with self._unsynced_lock:
                paths, self._unsynced = self._unsynced, {}
            for path in paths:
                with opened_place(path) as place:
                    place.sync()
            for directory in {path.parent for path in paths}:
                sync_directory(directory)
            if paths:
                sync_directory(self._directory)

    def usage(self) -> Usage:
        with _reporting(self._directory, "read"):
            counted = self._counts.read()
            if counted is None:
                sizes = list(sample_sizes(self._directory))
                counted = len(sizes), sum(sizes)
            return Usage(*counted, self._capacity_bytes)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.sync()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError("this file store was closed", where=str(self._directory))

    def _path(self, sample_id: str) -> Path:
        problem = file_name_problem(sample_id)
        if problem:
            raise StoreError(f"sample id {sample_id[:80]!r} cannot name a file: {problem}", where=str(self._directory))
        digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=1).hexdigest()
        return self._directory / digest / (sample_id + SUFFIX)

    def _reserve(self, place: SamplePlace, aside: AsideFile, nbytes: int) -> int:
        """Room for a file that replaces what is in its place; the generation it gets.

        From here on its size counts, and is the size of what is aside.

        :raises StoreFull: before anything is written.
        """
        with ExitStack() as opened, self._locked() as counts:
            held = place.look(opened)
            growth = nbytes - (held.nbytes if held else 0)
            if self._capacity_bytes is not None and counts.nbytes + growth > self._capacity_bytes:
                self._count_again(counts)  # a process that was killed may have left it too high
                if counts.nbytes + growth > self._capacity_bytes:
                    raise StoreFull(
                        f"{nbytes} bytes do not fit: {counts.nbytes} of {self._capacity_bytes} are taken",
                        where=str(place.path),
                        hint="raise store.capacity_bytes or lower capture.high_watermark_windows",
                    )
            generation = counts.next_generation(held.generation if held else 0)
            with counts.announced(nbytes=nbytes):
                os.ftruncate(aside.descriptor, nbytes)
            return generation

    def _move_into_place(self, place: SamplePlace, aside: AsideFile, generation: int) -> None:
        with ExitStack() as opened, self._locked() as counts:
            held = place.look(opened)
            if held is not None and held.generation > generation:
                counts.nbytes -= aside.remove()  # put again meanwhile: it was replaced before it was there
                return
            with counts.announced(samples=0 if held else 1):
                place.replace_by(aside)
            counts.nbytes -= held.nbytes if held else 0

    def _give_up(self, aside: AsideFile) -> None:
        with self._locked() as counts:
            counts.nbytes -= aside.remove()

    def _remember(self, path: Path) -> None:
        with self._unsynced_lock:
            self._unsynced[path] = None
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

    @contextmanager
    def _locked(self) -> Iterator[Counts]:
        with self._counts.locked() as counts:
            if counts.lost:
                self._count_again(counts)
            yield counts

    def _count_again(self, counts: Counts) -> None:
        aside = self._aside.sweep(counts.clock())
        sizes = list(sample_sizes(self._directory))
        counts.recount(samples=len(sizes), nbytes=sum(sizes) + aside)


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
        in_the_way = str(error.filename or "")
        where = in_the_way if os.path.isabs(in_the_way) else str(path)
        raise StoreError(f"cannot be {done}: {error.strerror}", where=where, hint="check store.path") from error


_GONE = "if training did not free it, remove the feature directory and run `specforge capture` again"
