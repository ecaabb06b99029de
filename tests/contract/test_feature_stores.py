# SPDX-License-Identifier: Apache-2.0
"""The feature store contract on the built-in stores, and on broken ones that it must reject."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import (
    FeatureCorrupt,
    FeatureStore,
    PartContext,
    Sample,
    SampleRef,
    StaleRef,
    StoreFull,
    Usage,
)
from specforge_core.features.file_store import FileStore
from specforge_core.features.memory_store import MemoryStore
from specforge_core.features.sample_file import encode_sample
from specforge_core.hooks.builtin import FileStoreConfig, MemoryStoreConfig
from specforge_core.testing.conformance import assert_rejected
from specforge_core.testing.feature_store_suite import FeatureStoreSuite

torch.set_num_threads(1)


def context(directory: Path, token: str | None = None) -> PartContext:
    return PartContext(run_id="run", directory=directory, token=token)


def sample_file(directory: Path, ref: SampleRef) -> Path:
    (path,) = directory.rglob(f"{ref.sample_id}.safetensors")
    return path


class TestMemoryStore(FeatureStoreSuite):
    cross_process = False

    def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> MemoryStore:
        return MemoryStore(MemoryStoreConfig(name="memory", capacity_bytes=capacity_bytes), context(directory, token))


class TestFileStore(FeatureStoreSuite):
    def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> FileStore:
        return FileStore(FileStoreConfig(name="file", capacity_bytes=capacity_bytes), context(directory, token))

    def corrupt(self, directory: Path, ref: SampleRef, keep_bytes: int) -> None:
        path = sample_file(directory, ref)
        content = path.read_bytes()
        path.write_bytes(content[:keep_bytes])

    def substitute(self, directory: Path, ref: SampleRef, other: Sample) -> None:
        with sample_file(directory, ref).open("r+b") as file:
            encode_sample(ref.sample_id, other).write(file.fileno(), ref.generation)


class Aliasing(MemoryStore):
    """Hands out the tensors it holds."""

    def get(self, ref: SampleRef) -> Sample:
        super().get(ref)
        return self._held[ref.sample_id][1]


class Keeping(MemoryStore):
    """Holds the tensors it was handed."""

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        ref = super().put(sample_id, sample)
        self._held[sample_id] = (ref, sample)
        return ref


class Forgetful(MemoryStore):
    """Counts generations from one again after a delete."""

    def delete(self, ref: SampleRef) -> None:
        super().delete(ref)
        self._generations.pop(ref.sample_id, None)


class Unversioned(MemoryStore):
    """Returns whatever is there now."""

    def get(self, ref: SampleRef) -> Sample:
        try:
            return super().get(ref)
        except StaleRef:
            return super().get(self._held[ref.sample_id][0])


class Evicting(MemoryStore):
    """Makes room by dropping the oldest."""

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        while True:
            try:
                return super().put(sample_id, sample)
            except StoreFull:
                if not self._held:
                    raise
                self.delete(next(iter(self._held.values()))[0])


class Greedy(MemoryStore):
    """Deletes by id, whatever the generation."""

    def delete(self, ref: SampleRef) -> None:
        if ref.sample_id in self._held:
            super().delete(self._held[ref.sample_id][0])


class Normless(MemoryStore):
    """Loses whether hidden states are before or after the norm."""

    def get(self, ref: SampleRef) -> Sample:
        return dataclasses.replace(super().get(ref), last_hidden_norm=None)


class Narrowing(MemoryStore):
    """Stores doubles as floats."""

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        narrow = {n: t.float() if t.dtype is torch.float64 else t for n, t in sample.features.items()}
        return super().put(sample_id, dataclasses.replace(sample, features=narrow))


class Trusting(MemoryStore):
    """Does not compare what it holds with what the ref says."""

    def get(self, ref: SampleRef) -> Sample:
        try:
            return super().get(ref)
        except FeatureCorrupt:
            return super().get(self._held[ref.sample_id][0])


class Uncounted(MemoryStore):
    """Counts puts only."""

    def usage(self) -> Usage:
        return Usage(sum(self._generations.values()), super().usage().nbytes, self._capacity_bytes)


class Undying(MemoryStore):
    """Goes on after it was closed."""

    def close(self) -> None:
        pass


class Unguarded(FileStore):
    """Lets everybody in."""

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        super().__init__(config, dataclasses.replace(context, token=None))


class Sealed(FileStore):
    """Lets nobody in, whatever they know."""

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        changed = None if context.token is None else f"{context.token}{id(self)}"
        super().__init__(config, dataclasses.replace(context, token=changed))


class Own(FileStore):
    """Each process by itself."""

    def __init__(self, config: FileStoreConfig, context: PartContext) -> None:
        super().__init__(config, dataclasses.replace(context, directory=context.directory / str(id(self))))


class Tallying(FileStore):
    """Keeps a tally beside its samples, wherever that name leads."""

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        with (self._directory / "tally").open("a") as file:
            file.write(".")
        return super().put(sample_id, sample)


class Padding(FileStore):
    """Gives zeros for torn files instead of refusing them."""

    def get(self, ref: SampleRef) -> Sample:
        try:
            return super().get(ref)
        except FeatureCorrupt:
            blank = {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in ref.features}
            norm = next((spec.norm for spec in ref.features if spec.norm), None)
            return Sample(ref.prompt_id, ref.epoch, blank, norm)


CONTROLS = [
    (Aliasing, "test_what_was_returned_may_be_overwritten"),
    (Keeping, "test_what_was_put_may_be_overwritten"),
    (Forgetful, "test_generation_grows_across_delete"),
    (Unversioned, "test_replaced_is_stale"),
    (Evicting, "test_full_store_keeps_what_it_has"),
    (Greedy, "test_delete_twice_or_of_a_stale_ref_does_nothing"),
    (Normless, "test_norm_survives"),
    (Narrowing, "test_every_dtype_and_shape"),
    (Trusting, "test_ref_that_describes_something_else_is_corrupt"),
    (Uncounted, "test_usage_follows_put_and_delete"),
    (Undying, "test_closed_store_refuses"),
]


@pytest.mark.parametrize(("broken", "by"), CONTROLS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_stores_are_rejected(broken: type[MemoryStore], by: str) -> None:
    class BrokenSuite(FeatureStoreSuite):
        cross_process = False

        def make_store(
            self, directory: Path, capacity_bytes: int | None = None, token: str | None = None
        ) -> MemoryStore:
            return broken(MemoryStoreConfig(name="memory", capacity_bytes=capacity_bytes), context(directory, token))

    assert_rejected(BrokenSuite, by=by)


@pytest.mark.parametrize(
    ("broken", "by"),
    [
        (Unguarded, "test_who_does_not_know_the_token_is_refused"),
        (Unguarded, "test_an_emptied_store_still_asks_for_its_token"),
        (Sealed, "test_who_knows_the_token_attaches"),
        (Own, "test_who_attaches_reads_what_another_put"),
        (Tallying, "test_a_planted_link_leads_nowhere"),
    ],
)
def test_stores_that_share_or_guard_wrongly_are_rejected(broken: type[FileStore], by: str) -> None:
    class BrokenSuite(FeatureStoreSuite):
        def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> FileStore:
            return broken(FileStoreConfig(name="file", capacity_bytes=capacity_bytes), context(directory, token))

    assert_rejected(BrokenSuite, by=by)


def test_a_store_whose_bytes_nobody_vouches_for_is_rejected() -> None:
    class BrokenSuite(TestFileStore):
        def vouch(self, store: FeatureStore) -> FeatureStore:
            return store

    assert_rejected(BrokenSuite, by="test_substituted_bytes_are_noticed_where_refs_are_signed")


def test_a_store_that_pads_torn_files_is_rejected() -> None:
    class BrokenSuite(TestFileStore):
        def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> FileStore:
            return Padding(FileStoreConfig(name="file", capacity_bytes=capacity_bytes), context(directory, token))

    assert_rejected(BrokenSuite, by="test_torn_bytes_are_corrupt")
