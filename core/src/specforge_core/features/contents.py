# SPDX-License-Identifier: Apache-2.0
"""A sample's bytes under its ref's signature: whoever can write into a store cannot have other bytes trained.

With a token the run's store is wrapped here, whatever store it is. ``put`` adds a digest of the sample's contents to
the ref, which is signed with it; ``get`` refuses contents that are not those. A store's own checksum notices damage,
but whoever replaces the bytes replaces it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from blake3 import blake3

from specforge_core.contracts import FeatureCorrupt, FeatureStore, Sample, SampleRef, Usage, locate
from specforge_core.features.pieces import raw_bytes

if TYPE_CHECKING:
    from torch import Tensor


def digest_features(features: Mapping[str, Tensor]) -> str:
    """BLAKE3, 64 hexadecimal digits, over every tensor's name, shape, dtype and bytes, in the order of their names.

    Of the cryptographic hashes at hand it is the one whose cost stays below that of copying the bytes.
    """
    found = blake3()
    for name, tensor in sorted(features.items()):
        told = json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode()
        found.update(len(told).to_bytes(8, "little") + told)
        found.update(raw_bytes(tensor.detach().to("cpu").contiguous()))
    return found.hexdigest()


class VouchedStore(FeatureStore):
    """A store whose refs vouch for the bytes they name."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        return replace(self._store.put(sample_id, sample), digest=digest_features(sample.features))

    def get(self, ref: SampleRef) -> Sample:
        """As the contract says.

        :raises FeatureCorrupt: also where the bytes are not those that were put under this ref.
        """
        sample = self._store.get(ref)
        if digest_features(sample.features) != ref.digest:
            raise FeatureCorrupt(
                "its features are not the ones that were signed: somebody altered or replaced them",
                where=locate(ref),
                hint="find out who else can write into the store; then remove its features and capture them again",
            )
        return sample

    def delete(self, ref: SampleRef) -> None:
        self._store.delete(ref)

    def sync(self) -> None:
        self._store.sync()

    def usage(self) -> Usage:
        return self._store.usage()

    def close(self) -> None:
        self._store.close()
