# SPDX-License-Identifier: Apache-2.0
"""Held-out features: how an online run comes by them, and how they become micro-batches for evaluation.

They are captured once and kept in files beside the run, whatever the run's own store; evaluation reads them again each
time. The seed of a sample does not depend on the evaluation, so two evaluations differ by the draft alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from specforge_core.contracts import (
    Batch,
    FeatureCorrupt,
    FeatureGone,
    FeatureStore,
    Progress,
    Prompt,
    RefWriter,
    SampleRef,
    StaleRef,
    Strategy,
)
from specforge_core.loading.demand import PlannedBatch
from specforge_core.loading.order import sample_seed
from specforge_core.loading.planned import only_missing
from specforge_core.loading.sample_reader import SampleReader
from specforge_core.loading.supply import Supply
from specforge_core.loading.windows import split

_RECAPTURES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out prompts with their refs, and how to cut them.

    Iterating collates one micro-batch after another (this rank's share). Raises what ``SampleReader.read`` raises.

    :param refs: one for each of ``prompts``, in their order.
    """

    reader: SampleReader
    refs: Sequence[SampleRef]
    prompts: Sequence[Prompt]
    strategy: Strategy
    micro_batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return math.ceil(len(self._mine()) / self.micro_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for indices in split(self._mine(), len(self)):
            samples = [self.reader.read(self.refs[index], self.prompts[index]) for index in indices]
            seeds = [sample_seed(self.seed, 0, sample.prompt_id) for sample in samples]
            yield self.strategy.collate(samples, seeds)

    def _mine(self) -> list[int]:
        """Places in ``refs``, the longest first."""
        captured = [index for index, ref in enumerate(self.refs) if not ref.skipped]
        return sorted(captured, key=lambda index: -self.refs[index].num_tokens)[self.rank :: self.world_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCopy:
    """Has held-out samples captured over the run's wires and keeps copies.

    :param source: reads from the run's store; the samples are freed there as soon as they are copied.
    :param kept: the files beside the run; ``writer`` has the refs of what they hold.
    """

    supply: Supply
    source: SampleReader
    kept: FeatureStore
    writer: RefWriter
    sign: Callable[[SampleRef], SampleRef]
    progress: Progress

    def collect(self, prompts: Sequence[Prompt], sample_ids: Sequence[str], planned: Iterator[PlannedBatch]) -> None:
        """Copy every sample that is not kept yet.

        :param sample_ids: of each of ``prompts``.
        :raises SpecForgeError: what ``Supply.collect`` and the stores raise.
        """
        done = {ref.sample_id for ref in self.writer.published()}
        self.progress.begin("held-out features", len(sample_ids) - len(done))
        self.supply.forget_deals([key for key in sample_ids if key not in done])
        self.supply.want(only_missing(planned, done))
        for index, key in enumerate(sample_ids):
            if key not in done:
                self._copy(key, prompts[index], window=-1 - index)  # no window of training has such a number
                self.progress.advance(1)
        self.writer.close()

    def _copy(self, key: str, prompt: Prompt, *, window: int) -> None:
        for attempt in range(_RECAPTURES):
            self.supply.collect([key], what="the held-out samples", patient=True)
            [ref] = self.supply.deal(window, [key])
            try:
                copied = ref if ref.skipped else self.kept.put(key, self.source.read(ref, prompt))
            except (FeatureGone, StaleRef, FeatureCorrupt):
                if attempt == _RECAPTURES - 1:
                    raise
                self.supply.lost([ref], intact=[])
                continue
            self.kept.sync()
            self.writer.publish([self.sign(copied)])
            self.supply.trained(window, [ref])
            self.supply.free([ref])
            return
