# SPDX-License-Identifier: Apache-2.0
"""Who and what gets at a store's features: ids that would escape, another process, a token that is wrong or missing.

It comes with :class:`specforge_core.testing.feature_store_suite.FeatureStoreSuite`; nobody subclasses it directly.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from specforge_core.contracts import FeatureGone, FeatureStore, SampleRef, SpecForgeError, StaleRef, StoreError
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.planted import copies_with_a_link, snapshot
from specforge_core.testing.samples import assert_same, make_sample

TOKEN = "the run's shared secret"
_UNUSUAL_IDS = [
    *(
        "",
        ".",
        "..",
        "../outside",
        "../../outside",
        "/outside",
        "a/b",
        "a\\b",
        "..\\outside",
        "~",
        "*",
        "%2e%2e%2foutside",
    ),
    *("nul\0byte", "line\nbreak", "x" * 300, "é" * 150, "\ud800", " ", "a:b", "a@b", "-rf"),
    *(".hidden", ".lock", ".aside", ".access", ".counts", "p.lock", "p.deleted", "p.tmp", "p.safetensors"),
]


class StoreAccessSuite(ContractSuite):
    """One store that is asked for the unusual, and two that were made for one directory, as two processes make them."""

    @abstractmethod
    def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> FeatureStore:
        """A store for ``directory``, with ``PartContext.token``; one that cannot be limited ignores ``capacity_bytes``.

        Where ``cross_process``, stores made for one directory hold the same features, and for two directories never.
        """

    limits_capacity = True
    """False for a store whose capacity cannot be set: it is not asked to be full."""

    cross_process = True
    """False for a store to which nobody can attach: it is asked neither to share its features nor to guard them."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[FeatureStore]:
        store = self.make_store(tmp_path / "store")
        yield store
        store.close()

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """One that two stores are made for."""
        if not self.cross_process:
            pytest.skip("nobody can attach to this store")
        return tmp_path / "store"

    def attach_and_read(self, directory: Path, ref: SampleRef, token: str | None) -> None:
        """:raises PermissionError: at the latest when a feature is read."""
        store = self.make_store(directory, token=token)
        try:
            store.get(ref)
        finally:
            store.close()

    @pytest.mark.parametrize("sample_id", _UNUSUAL_IDS, ids=lambda name: ascii(name)[:12])
    def test_unusual_ids_are_refused_or_held(self, tmp_path: Path, store: FeatureStore, sample_id: str) -> None:
        usual = store.put("p.e0", make_sample(1))
        before = set(tmp_path.iterdir()) | {tmp_path / "store"}
        try:
            ref = store.put(sample_id, make_sample())
        except StoreError:
            assert store.usage().samples == 1
        else:
            assert_same(store.get(ref), make_sample())
            store.delete(ref)
        assert_same(store.get(usual), make_sample(1))
        assert set(tmp_path.iterdir()) <= before

    @pytest.mark.parametrize("sample_id", _UNUSUAL_IDS, ids=lambda name: ascii(name)[:12])
    def test_refs_with_unusual_ids_reach_nothing(self, tmp_path: Path, store: FeatureStore, sample_id: str) -> None:
        """A ref comes from a channel: whoever can write there must not have files read or removed."""
        ref = store.put("p.e0", make_sample())
        hostile = dataclasses.replace(ref, sample_id=sample_id)
        kept = [tmp_path / f"outside{suffix}" for suffix in ("", ".safetensors")]
        for path in kept:
            path.write_bytes(b"somebody's")
        with pytest.raises(StoreError):
            store.get(hostile)
        with suppress(StoreError):
            store.delete(hostile)
        assert_same(store.get(ref), make_sample())
        assert [path.read_bytes() for path in kept] == [b"somebody's"] * 2

    def test_who_attaches_reads_what_another_put(self, directory: Path) -> None:
        first, second = self.make_store(directory), self.make_store(directory)
        ref = first.put("p.e0", make_sample(0))
        assert_same(second.get(ref), make_sample(0))
        again = second.put("p.e0", make_sample(1))
        assert again.generation > ref.generation
        assert_same(first.get(again), make_sample(1))
        with pytest.raises(StaleRef):
            first.get(ref)
        first.delete(again)
        with pytest.raises(FeatureGone):
            second.get(again)
        assert second.put("p.e0", make_sample(2)).generation > again.generation
        first.close()
        second.close()

    def test_who_knows_the_token_attaches(self, directory: Path) -> None:
        first, second = (self.make_store(directory, token=TOKEN) for _ in range(2))
        ref = first.put("p.e0", make_sample())
        assert_same(second.get(ref), make_sample())
        second.delete(ref)
        first.close()
        second.close()

    @pytest.mark.parametrize("other", [None, "", "another secret", TOKEN + " "], ids=repr)
    def test_who_does_not_know_the_token_is_refused(self, directory: Path, other: str | None) -> None:
        store = self.make_store(directory, token=TOKEN)
        ref = store.put("p.e0", make_sample())
        with pytest.raises(PermissionError):
            self.attach_and_read(directory, ref, other)
        assert_same(store.get(ref), make_sample())
        self.attach_and_read(directory, ref, TOKEN)
        store.close()

    def test_an_emptied_store_still_asks_for_its_token(self, directory: Path) -> None:
        store = self.make_store(directory, token=TOKEN)
        ref = store.put("p.e0", make_sample())
        store.delete(ref)
        with pytest.raises(PermissionError):
            self.attach_and_read(directory, ref, None)
        store.close()

    def test_a_planted_link_leads_nowhere(self, directory: Path, tmp_path: Path) -> None:
        """Others may write into a directory that processes share: nothing that it links to is touched."""
        store = self.make_store(directory)
        refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(2)]
        store.close()
        if not directory.exists():
            pytest.skip("this store keeps nothing in its directory")
        for copy, outside in copies_with_a_link(directory, tmp_path):
            before = snapshot(outside)
            with suppress(SpecForgeError):
                self._use_as_far_as_it_goes(self.make_store(copy), refs)
            assert snapshot(outside) == before, f"the store followed {copy}'s link to {outside}"

    def _use_as_far_as_it_goes(self, store: FeatureStore, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            for act in (partial(store.get, ref), partial(store.delete, ref), store.usage):
                with suppress(SpecForgeError):
                    act()
        for number in range(3):
            with suppress(SpecForgeError):
                store.put(f"p{number}.e0", make_sample(number))
        with suppress(SpecForgeError):
            store.close()
