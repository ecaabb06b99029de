# SPDX-License-Identifier: Apache-2.0
"""Features in this process's memory, for a run whose two halves are threads of one process.

Tensors are copied into host memory by ``put`` and copied out by ``get``: neither side can change what the store holds.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from specforge_core.contracts import (
    FeatureCorrupt,
    FeatureGone,
    FeatureStore,
    PartContext,
    Sample,
    SampleRef,
    StaleRef,
    StoreError,
    StoreFull,
    Usage,
    describe_sample,
)

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import MemoryStoreConfig


class MemoryStore(FeatureStore):
    """Samples in a dictionary. Both halves of a run share one instance.

    Nobody can attach from outside, so ``context.token`` guards nothing here.
    """

    def __init__(self, config: MemoryStoreConfig, context: PartContext) -> None:
        self._name = config.name
        self._capacity_bytes = config.capacity_bytes
        self._lock = threading.Lock()
        self._held: dict[str, tuple[SampleRef, Sample]] = {}
        self._generations: dict[str, int] = {}
        self._nbytes = 0
        self._closed = False

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        ref = describe_sample(sample_id, sample, store=self._name)
        copied = replace(sample, features={n: t.detach().to("cpu", copy=True) for n, t in sample.features.items()})
        with self._lock:
            self._refuse_closed()
            freed = self._held[sample_id][0].nbytes if sample_id in self._held else 0
            held = self._nbytes - freed + ref.nbytes
            if self._capacity_bytes is not None and held > self._capacity_bytes:
                raise StoreFull(
                    f"{ref.nbytes} bytes do not fit: {self._nbytes} of {self._capacity_bytes} are taken",
                    where=sample_id,
                    hint="raise store.capacity_bytes or lower capture.high_watermark_windows",
                )
            generation = self._generations.get(sample_id, 0) + 1
            ref = replace(ref, generation=generation)
            self._generations[sample_id] = generation
            self._held[sample_id] = (ref, copied)
            self._nbytes = held
        return ref

    def get(self, ref: SampleRef) -> Sample:
        with self._lock:
            self._refuse_closed()
            found = self._held.get(ref.sample_id)
        if found is None:
            raise FeatureGone("its features were deleted, or never put here", where=ref.sample_id)
        held, sample = found
        if held.generation != ref.generation:
            raise StaleRef(f"generation {ref.generation} was replaced by {held.generation}", where=ref.sample_id)
        if sorted(held.features, key=lambda spec: spec.name) != sorted(ref.features, key=lambda spec: spec.name):
            raise FeatureCorrupt("the stored tensors are not what the ref describes", where=ref.sample_id)
        return replace(sample, features={name: tensor.clone() for name, tensor in sample.features.items()})

    def delete(self, ref: SampleRef) -> None:
        with self._lock:
            self._refuse_closed()
            found = self._held.get(ref.sample_id)
            if found is not None and found[0].generation == ref.generation:
                self._nbytes -= found[0].nbytes
                del self._held[ref.sample_id]

    def usage(self) -> Usage:
        with self._lock:
            return Usage(len(self._held), self._nbytes, self._capacity_bytes)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._held.clear()
            self._nbytes = 0

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError("this memory store was closed")
