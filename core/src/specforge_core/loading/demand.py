# SPDX-License-Identifier: Apache-2.0
"""What training needs captured: offers batches of prompts ahead of the windows that will need them.

The train role alone knows what it still needs, so it asks; capture processes, however many and wherever, only take what
is offered. Each sample is wanted (offered), then here (its ref came), then acked. Whatever gets lost on the way, a
channel's whole content included, is found by comparing what is wanted with what the desk still has, and offered again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from specforge_core.contracts import CaptureBatch, DataError, InFlight, LeaseDesk
from specforge_core.loading.backpressure import Backpressure, Decision, Watermarks

_MOST_OFFERS = 6


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """A batch and what it will bring: by offset in the batch, the sample's id and bytes."""

    batch: CaptureBatch
    samples: Mapping[int, tuple[str, int]]


@dataclass(slots=True)
class _Sample:
    planned: PlannedBatch
    offset: int
    nbytes: int
    here: bool = False


class Demand:
    """Keeps offers as far ahead of training as the watermarks allow. Used by one thread."""

    def __init__(self, desk: LeaseDesk, watermarks: Watermarks) -> None:
        self._desk = desk
        self._backpressure = Backpressure(watermarks)
        self._planned: Iterator[PlannedBatch] = iter(())
        self._next: PlannedBatch | None = None
        self._available: set[str] = set()
        self._places: set[tuple[str, int, int]] = set()
        self._in_flight: dict[str, _Sample] = {}
        self._nbytes = 0
        self._kept: dict[str, int] = {}
        self._kept_bytes = 0
        self._offers: dict[str, int] = defaultdict(int)

    def begin(
        self, planned: Iterator[PlannedBatch], available: Collection[str], *, outstanding: Collection[CaptureBatch]
    ) -> None:
        """Want these batches, one after another, but for samples that are ``available`` already.

        :param outstanding: what an earlier session offered and nobody had finished, asked for before everything
            published was read: it stays offered and is not offered again.
        """
        self._planned = planned
        self._next = next(planned, None)
        self._available = set(available)
        self._places = _places(outstanding)
        self.top_up()

    @property
    def in_flight(self) -> InFlight:
        """Offered (or found) and not acked."""
        return InFlight(len(self._in_flight), self._nbytes)

    @property
    def keeps_any(self) -> bool:
        """Some samples are trained and wait for a checkpoint to be freed."""
        return bool(self._kept)

    @property
    def short_of_room(self) -> bool:
        """It is time for the next batch, and samples that wait for a checkpoint keep it from being offered."""
        if self._next is None or not self._kept or not self._backpressure.is_low(self.in_flight):
            return False
        nbytes = self._nbytes + _size(self._next).nbytes
        return not self._backpressure.has_room(nbytes + self._kept_bytes)

    def top_up(self) -> None:
        """Offer what the watermarks allow."""
        offers = []
        while self._next is not None and self._may_offer(self._next):
            planned, self._next = self._next, next(self._planned, None)
            missing = []
            for offset, (sample_id, nbytes) in planned.samples.items():
                here = sample_id in self._available
                self._available.discard(sample_id)
                self._in_flight[sample_id] = _Sample(planned, offset, nbytes, here)
                self._nbytes += nbytes
                if not here and _place(planned.batch, offset) not in self._places:
                    missing.append(offset)
            if missing:
                offers.append(_only(planned.batch, missing))
        if offers:
            self._desk.offer(offers)

    def _may_offer(self, planned: PlannedBatch) -> bool:
        decision = self._backpressure.observe(self.in_flight, batch=_size(planned), kept_bytes=self._kept_bytes)
        return decision is Decision.GO

    def arrived(self, sample_ids: Iterable[str]) -> None:
        """These samples' refs came."""
        for sample_id in sample_ids:
            if sample_id in self._in_flight:
                self._in_flight[sample_id].here = True

    def acked(self, sample_ids: Iterable[str], *, kept: bool) -> None:
        """These samples are trained; ``kept``: their features stay until ``freed``."""
        for sample_id in sample_ids:
            sample = self._in_flight.pop(sample_id, None)
            if sample is None:
                continue
            self._nbytes -= sample.nbytes
            self._offers.pop(sample_id, None)
            if kept:
                self._kept[sample_id] = sample.nbytes
                self._kept_bytes += sample.nbytes

    def freed(self, sample_ids: Iterable[str]) -> None:
        """These samples' features were deleted."""
        for sample_id in sample_ids:
            self._kept_bytes -= self._kept.pop(sample_id, 0)

    def lost(self, sample_ids: Iterable[str]) -> None:
        """These samples' features are gone after their refs had come: ``offer_again`` will find them."""
        for sample_id in sample_ids:
            if sample_id in self._in_flight:
                self._in_flight[sample_id].here = False
            self._available.discard(sample_id)  # where there was no room yet to ask for it: it will be asked for then

    def outstanding(self) -> list[CaptureBatch]:
        """What the desk has now. To be asked before the channel is read; see ``begin`` and ``offer_again``."""
        return self._desk.outstanding()

    def offer_again(self, outstanding: Collection[CaptureBatch]) -> int:
        """Offer what is wanted, is not here and was in nobody's hands; returns how many samples that were.

        A holder publishes before it finishes. So what was not ``outstanding`` before everything published was read,
        and is not here after, will not come by itself.

        :raises DataError: a sample was offered too often; something destroys what is captured.
        """
        places, keys = _places(outstanding), {batch.key for batch in outstanding}
        again: dict[str, list[tuple[str, _Sample]]] = defaultdict(list)
        for sample_id, sample in self._in_flight.items():
            batch = sample.planned.batch
            if not sample.here and batch.key not in keys and _place(batch, sample.offset) not in places:
                again[batch.key].append((sample_id, sample))
        for sample_id, _ in (item for items in again.values() for item in items):
            self._offers[sample_id] += 1
            if self._offers[sample_id] >= _MOST_OFFERS:
                raise DataError(
                    f"offered for capture {_MOST_OFFERS} times, and its features never reached training",
                    where=f"sample {sample_id}",
                    hint="see the logs of the capture processes and of the store's and channel's servers",
                )
        offers = [_only(items[0][1].planned.batch, [s.offset for _, s in items]) for items in again.values()]
        if offers:
            self._desk.offer(offers)
        return sum(len(items) for items in again.values())


class NothingWanted(Demand):
    """Offline: everything was captured before, and a desk is not even opened."""

    def __init__(self) -> None:
        pass

    def begin(
        self, planned: Iterator[PlannedBatch], available: Collection[str], *, outstanding: Collection[CaptureBatch]
    ) -> None:
        pass

    @property
    def keeps_any(self) -> bool:
        return False

    @property
    def short_of_room(self) -> bool:
        return False

    def top_up(self) -> None:
        pass

    def arrived(self, sample_ids: Iterable[str]) -> None:
        pass

    def acked(self, sample_ids: Iterable[str], *, kept: bool) -> None:
        pass

    def freed(self, sample_ids: Iterable[str]) -> None:
        pass

    def outstanding(self) -> list[CaptureBatch]:
        return []

    def offer_again(self, outstanding: Collection[CaptureBatch]) -> int:
        return 0


def _size(planned: PlannedBatch) -> InFlight:
    return InFlight(len(planned.samples), sum(nbytes for _, nbytes in planned.samples.values()))


def _place(batch: CaptureBatch, offset: int) -> tuple[str, int, int]:
    return batch.split, batch.epoch, batch.first + offset


def _places(batches: Iterable[CaptureBatch]) -> set[tuple[str, int, int]]:
    return {_place(batch, offset) for batch in batches for offset in batch.offsets}


def _only(batch: CaptureBatch, offsets: list[int]) -> CaptureBatch:
    return replace(batch, wanted=() if len(offsets) == batch.count else tuple(offsets))
