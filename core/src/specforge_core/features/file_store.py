# SPDX-License-Identifier: Apache-2.0
"""Features as files: one safetensors file per sample, in a directory that may be a shared mount.

``<directory>/<two hex digits of the id's hash>/<sample id>.safetensors``. A file is written aside, synced and renamed,
so it is complete or absent. ``delete`` leaves ``<sample id>.deleted`` behind, a file without blocks whose *length* is
the last generation: a later ``put`` goes on counting from there. Only ``put`` and ``delete`` of one shard exclude one
another, between processes too; ``get`` never waits.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
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
)
from specforge_core.features.file_lock import is_locked, lock_file, sync_directory
from specforge_core.features.identity import describe_sample, file_name_problem
from specforge_core.features.sample_file import check_length, encode_sample, read_features, read_header, write_all
from specforge_core.features.store_access import claim_or_attach

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import FileStoreConfig

_SUFFIX = ".safetensors"
_DELETED = ".deleted"
_ASIDE = ".aside"
_LOCK_SECONDS = 60.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one sample's file, its tombstone and its shard's lock are."""

    file: Path
    deleted: Path
    lock: Path


class FileStore(FeatureStore):
    """Samples as files. Any number of processes may open one directory.

    ``usage`` counts what was there when the store was opened and what this process put and deleted since; the
    directory is counted again before a ``put`` is refused for lack of capacity.
    """

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        self._name = config.name
        self._directory = config.path or context.directory / "store"
        self._capacity_bytes = config.capacity_bytes
        self._lock = threading.Lock()
        self._closed = False
        self._writing = 0
        self._remove_abandoned()
        self._samples, self._nbytes = self._count()
        with _reporting(self._directory, "opened"):
            claim_or_attach(self._directory, token=context.token, holds_samples=self._samples > 0)

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        self._refuse_closed()
        place = self._place(sample_id)
        ref = describe_sample(sample_id, sample, generation=0, store=self._name)
        with _reporting(place.file, "written"):
            place.file.parent.mkdir(parents=True, exist_ok=True)
            with self._locked_shard(place):
                ref = replace(ref, generation=_last_generation(place) + 1)
                content = encode_sample(sample_id, sample, ref.generation)
                with self._reserved(sum(buffer.nbytes for buffer in content), place):
                    self._write(place, content)
        return ref

    def get(self, ref: SampleRef) -> Sample:
        self._refuse_closed()
        place = self._place(ref.sample_id)
        where = str(place.file)
        try:
            descriptor = os.open(place.file, os.O_RDONLY)
        except FileNotFoundError:
            raise FeatureGone(
                f"{ref.sample_id} was deleted, or never put here",
                where=where,
                hint="if training did not free it, remove the feature directory and run `specforge capture` again",
            ) from None
        except OSError as error:
            raise StoreError(f"{ref.sample_id} cannot be read: {error.strerror}", where=where) from error
        try:
            header = read_header(descriptor, where=where)
            check_length(descriptor, header, where=where)
            if header.generation != ref.generation:
                raise StaleRef(f"generation {ref.generation} was replaced by {header.generation}", where=where)
            described = (ref.sample_id, ref.prompt_id, ref.epoch, _by_name(ref.features))
            if (header.sample_id, header.prompt_id, header.epoch, _by_name(header.specs)) != described:
                raise FeatureCorrupt("the file does not hold what the ref describes", where=where)
            features = read_features(descriptor, header, where=where)
        except OSError as error:
            raise FeatureCorrupt(f"{ref.sample_id} cannot be read: {error.strerror}", where=where) from error
        finally:
            os.close(descriptor)
        return Sample(header.prompt_id, header.epoch, features, header.norm)

    def delete(self, ref: SampleRef) -> None:
        self._refuse_closed()
        place = self._place(ref.sample_id)
        if not place.file.exists():
            return
        with _reporting(place.file, "deleted"), self._locked_shard(place):
            size = _size(place.file)
            if size is None or _generation(place.file) != ref.generation:
                return
            # First the tombstone: a crash between the two leaves the sample as it was.
            place.deleted.touch()
            os.truncate(place.deleted, ref.generation)
            place.file.unlink()
            with self._lock:
                self._samples, self._nbytes = self._samples - 1, self._nbytes - size

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self._samples, self._nbytes, self._capacity_bytes)

    def close(self) -> None:
        self._closed = True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError("this file store was closed", where=str(self._directory))

    def _place(self, sample_id: str) -> _Place:
        problem = file_name_problem(sample_id)
        if problem:
            raise StoreError(f"sample id {sample_id[:80]!r} cannot name a file: {problem}", where=str(self._directory))
        digest = hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=1).hexdigest()
        shard = self._directory / digest
        return _Place(shard / (sample_id + _SUFFIX), shard / (sample_id + _DELETED), shard / ".lock")

    @contextmanager
    def _locked_shard(self, place: _Place) -> Iterator[None]:
        with place.lock.open("ab") as file:
            if not lock_file(file, seconds=_LOCK_SECONDS):
                raise StoreError(f"another process kept the shard locked for {_LOCK_SECONDS:g} s", where=file.name)
            yield

    @contextmanager
    def _reserved(self, nbytes: int, place: _Place) -> Iterator[None]:
        """Room for a file that replaces what is in its place.

        :raises StoreFull: before anything is written.
        """
        before = _size(place.file)
        growth = nbytes - (before or 0)
        with self._lock:
            if not self._fits(growth):
                self._samples, self._nbytes = self._count()  # other processes may have deleted
            if not self._fits(growth):
                raise StoreFull(
                    f"{nbytes} bytes do not fit: {self._nbytes} of {self._capacity_bytes} are taken",
                    where=str(place.file),
                    hint="raise store.capacity_bytes or lower capture.high_watermark_windows",
                )
            self._writing += growth
        written = False
        try:
            yield
            written = True
        finally:
            with self._lock:
                self._writing -= growth
                self._nbytes += growth if written else 0
                self._samples += 1 if written and before is None else 0

    def _fits(self, growth: int) -> bool:
        return self._capacity_bytes is None or self._nbytes + self._writing + growth <= self._capacity_bytes

    def _write(self, place: _Place, content: list[memoryview]) -> None:
        """Write aside, sync, rename."""
        aside, file = self._open_aside()
        try:
            with file:
                write_all(file.fileno(), content)
                os.fsync(file.fileno())
                aside.replace(place.file)
            sync_directory(place.file.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        place.deleted.unlink(missing_ok=True)

    def _open_aside(self) -> tuple[Path, FileIO]:
        """A new file that is locked while its writer lives, so that it is not taken for an abandoned one."""
        directory = self._directory / _ASIDE
        directory.mkdir(exist_ok=True)
        while True:
            path = directory / os.urandom(8).hex()
            file = path.open("xb", buffering=0)
            if lock_file(file, seconds=_LOCK_SECONDS) and os.fstat(file.fileno()).st_nlink:
                return path, file
            file.close()  # a store that was being opened took it for abandoned before it was locked

    def _count(self) -> tuple[int, int]:
        samples = nbytes = 0
        for path in self._directory.glob(f"[0-9a-f][0-9a-f]/*{_SUFFIX}"):
            size = _size(path)
            if size is not None:
                samples, nbytes = samples + 1, nbytes + size
        return samples, nbytes

    def _remove_abandoned(self) -> None:
        """Remove what a process that died in the middle of a ``put`` left aside."""
        for path in (self._directory / _ASIDE).glob("*"):
            with suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
                if not is_locked(file):
                    path.unlink()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _last_generation(place: _Place) -> int:
    """The newest generation ever given to this id here."""
    return max(_generation(place.file), _size(place.deleted) or 0)


def _generation(path: Path) -> int:
    """The generation a sample file carries; 0 where there is none that can be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return read_header(descriptor, where=str(path)).generation
    except FeatureCorrupt:
        return 0
    finally:
        os.close(descriptor)


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
