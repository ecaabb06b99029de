# SPDX-License-Identifier: Apache-2.0
"""Held-out features as micro-batches for evaluation: read again at each evaluation, never deleted.

The seed of a sample does not depend on the evaluation, so two evaluations differ by the draft alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specforge_core.contracts import Batch, FeatureStore, SampleRef, Strategy
from specforge_core.loading.order import sample_seed
from specforge_core.loading.windows import by_length, split


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out refs, the store that has their features, and how to cut them.

    Iterating collates one micro-batch after another (this rank's share). Raises what ``store.get`` raises.
    """

    store: FeatureStore
    refs: Sequence[SampleRef]
    strategy: Strategy
    micro_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return math.ceil(len(self._mine()) / self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for refs in split(self._mine(), len(self)):
            samples = [self.store.get(ref) for ref in refs]
            yield self.strategy.collate(samples, [sample_seed(self.seed, 0, ref.prompt_id) for ref in refs])

    def _mine(self) -> list[SampleRef]:
        return by_length(self.refs)[self.rank :: self.world_size]
