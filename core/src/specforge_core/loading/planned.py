# SPDX-License-Identifier: Apache-2.0
"""Which batches a run's windows need captured: pure functions of the prompts' order.

Batches are cut at absolute multiples of the batch size in each epoch's order, wherever training starts, so that
capturing again repeats the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from specforge_core.contracts import CaptureBatch, Split
from specforge_core.loading.demand import PlannedBatch
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.windows import WindowPlan

Describe = Callable[[int], tuple[str, int]]
"""A prompt's index → the id its sample will have in the epoch at hand, and the bytes of its features."""


def cut_batches(
    order: Sequence[int], describe: Describe, *, batch: tuple[Split, int, str], size: int, places: range
) -> Iterator[PlannedBatch]:
    """The batches that hold ``places`` of one epoch's ``order``.

    :param batch: split, epoch and fingerprint of every batch.
    """
    split, epoch, fingerprint = batch
    for first in range(places.start - places.start % size, places.stop, size):
        count = min(size, len(order) - first)
        offsets = [offset for offset in range(count) if first + offset in places]
        yield PlannedBatch(
            CaptureBatch(
                split=split,
                epoch=epoch,
                first=first,
                count=count,
                wanted=() if len(offsets) == count else tuple(offsets),
                fingerprint=fingerprint,
            ),
            {offset: describe(order[first + offset]) for offset in offsets},
        )


def only_missing(planned: Iterator[PlannedBatch], done: Collection[str]) -> Iterator[PlannedBatch]:
    """The same batches without the samples in ``done``."""
    for item in planned:
        samples = {offset: sample for offset, sample in item.samples.items() if sample[0] not in done}
        if samples:
            wanted = () if len(samples) == item.batch.count else tuple(samples)
            yield PlannedBatch(replace(item.batch, wanted=wanted), samples)


def plan_epochs(
    plan: WindowPlan,
    order: PromptOrder,
    describe: Callable[[int], Describe],
    *,
    size: int,
    fingerprint: str,
    start: int,
) -> Iterator[PlannedBatch]:
    """The batches of windows ``start`` to the last, epoch after epoch.

    :param describe: an epoch → how its prompts are described.
    """
    if start >= plan.total_windows:
        return
    first_epoch, first = plan.place(start)
    last_epoch, last = plan.place(plan.total_windows - 1)
    for epoch in range(first_epoch, last_epoch + 1):
        begin = first.start if epoch == first_epoch else 0
        end = min(last.stop, plan.num_prompts) if epoch == last_epoch else plan.num_prompts
        yield from cut_batches(
            order.epoch(epoch),
            describe(epoch),
            batch=("train", epoch, fingerprint),
            size=size,
            places=range(begin, end),
        )
