# SPDX-License-Identifier: Apache-2.0
"""A sample's bytes under its ref's signature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import FeatureCorrupt, FeatureStore, PartContext
from specforge_core.features.contents import VouchedStore, digest_features
from specforge_core.features.file_store import FileStore
from specforge_core.features.memory_store import MemoryStore
from specforge_core.hooks.builtin import FileStoreConfig, MemoryStoreConfig
from specforge_core.testing.samples import make_sample

FEATURES = make_sample(1).features


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    context = PartContext(run_id="r", directory=tmp_path, token="sixteen characters or more")
    if request.param == "memory":
        return MemoryStore(MemoryStoreConfig(name="memory"), context)
    return FileStore(FileStoreConfig(name="file"), context)


def test_the_digest_covers_names_shapes_dtypes_and_every_byte() -> None:
    [name, *_] = FEATURES
    tensor = FEATURES[name]
    flipped = tensor.clone()
    flipped.view(torch.uint8).view(-1)[-1] ^= 1
    variants = [
        {**FEATURES, name: flipped},
        {**FEATURES, name: tensor.reshape(*tensor.shape, 1)},
        {**FEATURES, "other": tensor[:0]},
        {other: value for other, value in FEATURES.items() if other != name},
        {("other" if other == name else other): value for other, value in FEATURES.items()},
    ]
    digests = {digest_features(features) for features in (FEATURES, *variants)}
    assert len(digests) == 1 + len(variants)
    assert digest_features(dict(reversed(FEATURES.items()))) == digest_features(FEATURES)


def test_a_float_and_an_integer_of_the_same_bytes_are_not_the_same() -> None:
    ones = torch.ones(4, dtype=torch.int32)
    assert digest_features({"x": ones}) != digest_features({"x": ones.view(torch.float32)})


def test_what_was_put_comes_back(store: FeatureStore) -> None:
    vouched = VouchedStore(store)
    ref = vouched.put("p1.e0", make_sample(1))
    assert ref.digest == digest_features(FEATURES)
    assert digest_features(vouched.get(ref).features) == ref.digest
    assert vouched.usage() == store.usage()
    vouched.delete(ref)
    assert store.usage().samples == 0


def test_other_bytes_under_the_same_ref_are_refused(store: FeatureStore) -> None:
    """Whoever can write into the store puts what he likes there, with every checksum of the store's own right."""
    vouched = VouchedStore(store)
    ref = vouched.put("p1.e0", make_sample(1))
    forged = make_sample(1)
    forged.features["aux_hidden_states"].fill_(0.5)
    planted = store.put("p1.e0", forged)
    with pytest.raises(FeatureCorrupt, match=r"sample p1\.e0.*not the ones that were signed"):
        vouched.get(replace(planted, digest=ref.digest))


@pytest.mark.parametrize("digest", ["", "0" * 64, "é"])
def test_a_ref_without_its_digest_vouches_for_nothing(store: FeatureStore, digest: str) -> None:
    vouched = VouchedStore(store)
    ref = vouched.put("p1.e0", make_sample(1))
    with pytest.raises(FeatureCorrupt):
        vouched.get(replace(ref, digest=digest))
