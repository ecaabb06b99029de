# SPDX-License-Identifier: Apache-2.0
"""Tiny samples and refs for the contract suites, and how two samples are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_core.contracts import LAST_HIDDEN_STATES, FeatureStore, Sample, SampleRef, StoreFull


def make_sample(number: int = 0, *, num_tokens: int = 5, epoch: int = 0) -> Sample:
    """A small sample whose values depend on ``number``."""
    values = torch.arange(num_tokens * 6, dtype=torch.float32).reshape(num_tokens, 2, 3) + number
    features = {
        "input_ids": torch.arange(num_tokens) + number,
        "loss_mask": torch.arange(num_tokens) % 2 == 0,
        "aux_hidden_states": values,
        LAST_HIDDEN_STATES: values[:, 0, :].to(torch.bfloat16),
    }
    return Sample(f"prompt-{number}", epoch, features, last_hidden_norm="post")


def assert_same(found: Sample, expected: Sample) -> None:
    """Same ids, names, shapes, dtypes and bits."""
    assert (found.prompt_id, found.epoch, found.last_hidden_norm) == (
        expected.prompt_id,
        expected.epoch,
        expected.last_hidden_norm,
    )
    assert found.specs() == expected.specs()
    for name, tensor in expected.features.items():
        assert torch.equal(_bits(found.features[name]), _bits(tensor)), f"{name} differs"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def fill(tensor: Tensor, byte: int) -> None:
    """Overwrite every byte of a tensor."""
    tensor.reshape(-1).view(torch.uint8).fill_(byte)


def make_ref(number: int, *, epoch: int = 0, generation: int = 1) -> SampleRef:
    """The ref of ``make_sample(number)``, as a store named "any" might return it; lengths differ."""
    sample = make_sample(number, num_tokens=3 + number % 7, epoch=epoch)
    return SampleRef(
        sample_id=sample.sample_id,
        generation=generation,
        store="any",
        features=sample.specs(),
        num_tokens=sample.num_tokens,
        prompt_id=sample.prompt_id,
        epoch=epoch,
    )


def fill_up(store: FeatureStore) -> list[tuple[SampleRef, Sample]]:
    """Put until the store is full; what it took."""
    kept: list[tuple[SampleRef, Sample]] = []
    for number in range(100):
        sample = make_sample(number, num_tokens=50)
        try:
            kept.append((store.put(f"p{number}.e0", sample), sample))
        except StoreFull:
            return kept
    raise AssertionError(f"{len(kept)} samples fit into a store of {store.usage().capacity_bytes} bytes")
