# SPDX-License-Identifier: Apache-2.0
"""What every feature store must do. Subclass, provide ``make_store``, and pytest runs the contract::

    class TestMyStore(FeatureStoreSuite):
        def make_store(self, directory, capacity_bytes=None, token=None):
            context = PartContext(run_id="test", directory=directory, token=token)
            return MyStore(MyStoreConfig(name="mine", capacity_bytes=capacity_bytes), context)

Stores whose bytes can be reached from outside also provide ``corrupt`` and ``substitute``; those that only the process
that made them can reach say ``cross_process = False``.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from specforge_core import VouchedStore
from specforge_core.contracts import (
    DTYPE_BYTES,
    LAST_HIDDEN_STATES,
    FeatureCorrupt,
    FeatureGone,
    FeatureStore,
    Norm,
    Sample,
    SampleRef,
    StaleRef,
    StoreError,
    StoreFull,
    check_metadata_only,
)
from specforge_core.testing.samples import assert_same, fill, fill_up, make_sample
from specforge_core.testing.store_access_suite import StoreAccessSuite

JOIN_SECONDS = 60.0


class FeatureStoreSuite(StoreAccessSuite):
    """The contract of :class:`specforge_core.contracts.FeatureStore`."""

    thorough = frozenset({"test_threads_put_get_and_delete_at_once", "test_readers_never_see_a_mixture"})

    def corrupt(self, directory: Path, ref: SampleRef, keep_bytes: int) -> None:
        """Cut what is stored for ``ref`` to ``keep_bytes``. Without it, torn reads are not tested."""
        pytest.skip("this store's bytes cannot be reached from outside")

    def substitute(self, directory: Path, ref: SampleRef, other: Sample) -> None:
        """Put ``other``'s tensors where ``ref``'s are, as somebody does who reaches the bytes: same names, shapes and
        generation, every checksum of the store's own right. Without it, substituted bytes are not tested."""
        pytest.skip("this store's bytes cannot be reached from outside")

    def vouch(self, store: FeatureStore) -> FeatureStore:
        """The store as a run with a token uses it; a negative control uses another."""
        return VouchedStore(store)

    def test_substituted_bytes_are_noticed_where_refs_are_signed(self, tmp_path: Path, store: FeatureStore) -> None:
        vouched, other = self.vouch(store), make_sample(1)
        fill(other.features["aux_hidden_states"], 2)
        ref = vouched.put("p.e0", make_sample(1))
        assert_same(vouched.get(ref), make_sample(1))
        self.substitute(tmp_path / "store", ref, other)
        with pytest.raises(FeatureCorrupt):
            vouched.get(ref)

    def test_get_returns_what_was_put(self, store: FeatureStore) -> None:
        samples = [make_sample(number, num_tokens=3 + number) for number in range(4)]
        refs = [store.put(sample.sample_id, sample) for sample in samples]
        for ref, sample in zip(refs, samples, strict=True):
            assert_same(store.get(ref), sample)

    def test_ref_describes_the_sample(self, store: FeatureStore) -> None:
        sample = make_sample(7, num_tokens=9, epoch=2)
        ref = store.put(sample.sample_id, sample)
        check_metadata_only(ref)
        assert (ref.sample_id, ref.prompt_id, ref.epoch) == (sample.sample_id, "prompt-7", 2)
        assert (ref.num_tokens, ref.signature) == (9, "")
        assert sorted(ref.features, key=lambda spec: spec.name) == list(sample.specs())

    @pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
    @pytest.mark.parametrize("shape", [(4, 3), (0,), (4, 0, 2), ()], ids=str)
    def test_every_dtype_and_shape(self, store: FeatureStore, dtype: str, shape: tuple[int, ...]) -> None:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        fill(tensor, 1)
        sample = Sample("p", 0, {"input_ids": torch.arange(4), "aux_hidden_states": tensor})
        assert_same(store.get(store.put("p.e0", sample)), sample)

    def test_strided_tensors_are_stored_by_value(self, store: FeatureStore) -> None:
        whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        sample = Sample("p", 0, {"input_ids": torch.arange(8)[::2], "aux_hidden_states": whole.T[1:5:2]})
        assert_same(store.get(store.put("p.e0", sample)), sample)

    def test_norm_survives(self, store: FeatureStore) -> None:
        norms: tuple[Norm | None, ...] = (None, "pre", "post")
        for number, norm in enumerate(norms):
            sample = dataclasses.replace(make_sample(number), last_hidden_norm=norm)
            assert store.get(store.put(sample.sample_id, sample)).last_hidden_norm == norm

    def test_what_was_put_may_be_overwritten(self, store: FeatureStore) -> None:
        sample, expected = make_sample(), make_sample()
        ref = store.put(sample.sample_id, sample)
        for tensor in sample.features.values():
            fill(tensor, 0)
        assert_same(store.get(ref), expected)

    def test_what_was_returned_may_be_overwritten(self, store: FeatureStore) -> None:
        sample = make_sample()
        ref = store.put(sample.sample_id, sample)
        first, second = store.get(ref), store.get(ref)
        for name in first.features:
            fill(first.features[name], 0)
        assert_same(second, sample)
        assert_same(store.get(ref), sample)

    def test_tensors_of_one_sample_share_no_memory(self, store: FeatureStore) -> None:
        sample = make_sample()
        found = store.get(store.put(sample.sample_id, sample))
        fill(found.features["aux_hidden_states"], 0)
        assert torch.equal(found.features["input_ids"], sample.features["input_ids"])
        assert torch.equal(found.features[LAST_HIDDEN_STATES], sample.features[LAST_HIDDEN_STATES])

    def test_returned_memory_outlives_the_sample(self, store: FeatureStore) -> None:
        sample = make_sample()
        ref = store.put(sample.sample_id, sample)
        found = store.get(ref)
        store.delete(ref)
        store.put(sample.sample_id, make_sample(99))
        assert_same(found, sample)

    def test_put_again_bumps_the_generation(self, store: FeatureStore) -> None:
        refs = [store.put("p.e0", make_sample(number)) for number in range(3)]
        generations = [ref.generation for ref in refs]
        assert generations == sorted(set(generations))
        assert_same(store.get(refs[-1]), make_sample(2))

    def test_replaced_is_stale(self, store: FeatureStore) -> None:
        old = store.put("p.e0", make_sample(0))
        store.put("p.e0", make_sample(1))
        with pytest.raises(StaleRef):
            store.get(old)

    def test_deleted_is_gone(self, store: FeatureStore) -> None:
        ref, other = store.put("p.e0", make_sample(0)), store.put("q.e0", make_sample(1))
        store.delete(ref)
        with pytest.raises(FeatureGone):
            store.get(ref)
        assert_same(store.get(other), make_sample(1))

    def test_never_put_is_gone(self, store: FeatureStore) -> None:
        ref = store.put("p.e0", make_sample())
        with pytest.raises(FeatureGone):
            store.get(dataclasses.replace(ref, sample_id="q.e0"))

    def test_generation_grows_across_delete(self, store: FeatureStore) -> None:
        refs = []
        for number in range(3):
            refs.append(store.put("p.e0", make_sample(number)))
            store.delete(refs[-1])
        last = store.put("p.e0", make_sample(3))
        assert all(ref.generation < last.generation for ref in refs)
        with pytest.raises(StaleRef):
            store.get(refs[0])
        assert_same(store.get(last), make_sample(3))

    def test_delete_twice_or_of_a_stale_ref_does_nothing(self, store: FeatureStore) -> None:
        old = store.put("p.e0", make_sample(0))
        new = store.put("p.e0", make_sample(1))
        store.delete(old)
        assert_same(store.get(new), make_sample(1))
        store.delete(new)
        store.delete(new)
        assert store.usage().samples == 0

    def test_ref_that_describes_something_else_is_corrupt(self, store: FeatureStore) -> None:
        ref = store.put("p.e0", make_sample())
        spec = ref.features[0]
        for changed in (
            dataclasses.replace(spec, shape=(*spec.shape, 1)),
            dataclasses.replace(spec, dtype="uint8"),
            dataclasses.replace(spec, name="other"),
        ):
            with pytest.raises(FeatureCorrupt):
                store.get(dataclasses.replace(ref, features=(changed, *ref.features[1:])))

    def test_torn_bytes_are_corrupt(self, tmp_path: Path, store: FeatureStore) -> None:
        for number, keep_bytes in enumerate((0, 7, 20, 200, -1)):
            sample = make_sample(number)
            ref = store.put(sample.sample_id, sample)
            self.corrupt(tmp_path / "store", ref, keep_bytes)
            with pytest.raises(FeatureCorrupt):
                store.get(ref)
            again = store.put(sample.sample_id, sample)
            assert_same(store.get(again), sample)

    def test_usage_follows_put_and_delete(self, store: FeatureStore) -> None:
        assert (store.usage().samples, store.usage().nbytes) == (0, 0)
        refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(3)]
        assert store.usage().samples == 3
        assert store.usage().nbytes >= sum(ref.nbytes for ref in refs)
        store.put("p0.e0", make_sample(5))
        assert store.usage().samples == 3
        for ref in refs[1:]:
            store.delete(ref)
        assert store.usage().samples == 1

    def test_full_store_keeps_what_it_has(self, tmp_path: Path) -> None:
        if not self.limits_capacity:
            pytest.skip("this store's capacity cannot be set")
        store = self.make_store(tmp_path / "store", capacity_bytes=20_000)
        kept = fill_up(store)
        before = store.usage()
        assert len(kept) > 1
        assert before.samples == len(kept)
        assert before.nbytes <= 20_000
        assert before.capacity_bytes == 20_000
        with pytest.raises(StoreFull):
            store.put("big.e0", make_sample(1, num_tokens=5_000))
        with pytest.raises(StoreFull):
            store.put("p0.e0", make_sample(1, num_tokens=5_000))
        assert store.usage() == before
        for ref, sample in kept:
            assert_same(store.get(ref), sample)
        store.delete(kept[0][0])
        assert_same(store.get(store.put("again.e0", make_sample(8))), make_sample(8))
        store.close()

    def test_sync_may_be_called_at_any_time(self, store: FeatureStore) -> None:
        store.sync()
        ref, gone = store.put("p.e0", make_sample()), store.put("q.e0", make_sample())
        store.delete(gone)
        store.sync()
        assert_same(store.get(ref), make_sample())

    def test_closed_store_refuses(self, store: FeatureStore) -> None:
        ref = store.put("p.e0", make_sample())
        store.close()
        store.close()
        for call in (lambda: store.get(ref), lambda: store.put("q.e0", make_sample())):
            with pytest.raises(StoreError):
                call()

    def test_threads_put_get_and_delete_at_once(self, store: FeatureStore) -> None:
        def work(worker: int) -> int:
            for number in range(12):
                sample = make_sample(100 * worker + number)
                ref = store.put(sample.sample_id, sample)
                assert_same(store.get(ref), sample)
                if number % 2:
                    store.delete(ref)
            return worker

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(work, range(4), timeout=JOIN_SECONDS)) == [0, 1, 2, 3]
        assert store.usage().samples == 24

    def test_readers_never_see_a_mixture(self, store: FeatureStore) -> None:
        """One id is put again and again while others read: each read is whole, or stale, or gone."""
        first = store.put("p.e0", make_sample(0, num_tokens=400))
        latest, stop = [(first, 0)], threading.Event()

        def read() -> int:
            reads = 0
            while not stop.is_set():
                ref, number = latest[0]
                reads += _read_whole(store, ref, number)
            return reads

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for number in range(1, 30):
                    latest[0] = (store.put("p.e0", make_sample(number, num_tokens=400)), number)
            finally:
                stop.set()
            assert all(reader.result(timeout=JOIN_SECONDS) >= 0 for reader in readers)

    def test_generations_are_unique_between_threads(self, store: FeatureStore) -> None:
        with ThreadPoolExecutor(4) as pool:
            refs = list(pool.map(lambda n: store.put("p.e0", make_sample(n)), range(24), timeout=JOIN_SECONDS))
        assert len({ref.generation for ref in refs}) == len(refs)
        newest = max(refs, key=lambda ref: ref.generation)
        assert store.get(newest).prompt_id == newest.prompt_id


def _read_whole(store: FeatureStore, ref: SampleRef, number: int) -> bool:
    try:
        found = store.get(ref)
    except (StaleRef, FeatureGone):
        return False
    assert_same(found, make_sample(number, num_tokens=400))
    return True
