# SPDX-License-Identifier: Apache-2.0
"""The part of the feature store's contract that takes two stores: what they share, and whom they let in.

It comes with :class:`specforge_core.testing.feature_store_suite.FeatureStoreSuite`; nobody subclasses it directly.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

import pytest

from specforge_core.contracts import FeatureGone, FeatureStore, SampleRef, StaleRef
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.samples import assert_same, make_sample

TOKEN = "the run's shared secret"


class StoreAttachingSuite(ContractSuite):
    """Two stores that were made for one directory, as two processes of a run make them."""

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
