# SPDX-License-Identifier: Apache-2.0
"""The loader: refs come in, windows of collated micro-batches go out, in prompt order.

The trainer's thread collects refs through the ``Supply`` and hands every window whose refs have all come to a prefetch
thread, which reads the features and collates them, at most ``prefetch_windows`` ahead. A window whose features are gone
when they are to be read has them captured again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from specforge_core.contracts import (
    DeadlineExceeded,
    FeatureCorrupt,
    FeatureGone,
    Progress,
    Prompt,
    Sample,
    SampleRef,
    StaleRef,
    StopSignal,
    StoreError,
    Strategy,
)
from specforge_core.loading.demand import PlannedBatch
from specforge_core.loading.order import PromptOrder, sample_seed
from specforge_core.loading.prefetch import Prefetcher
from specforge_core.loading.sample_reader import SampleReader
from specforge_core.loading.supply import Supply
from specforge_core.loading.windows import Window, WindowPlan

if TYPE_CHECKING:
    from specforge_core.config.run_config import LoadingSection

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
_RECAPTURES = 5
_RETRY_SECONDS = (0.2, 1.0, 5.0)
_GONE = (FeatureGone, StaleRef, FeatureCorrupt)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A window whose refs are being collected.

    :param prompts: which prompt each of ``keys`` is of.
    """

    index: int
    epoch: int
    keys: Sequence[str]
    prompts: Sequence[int]


class _FeaturesLost(Exception):
    """Some of a window's features could not be read and never will; ``error`` is what the first of them said."""

    def __init__(self, lost: Sequence[SampleRef], intact: Sequence[SampleRef], error: StoreError) -> None:
        super().__init__(str(error))
        self.lost = lost
        self.intact = intact
        self.error = error


class _Upcoming:
    """The windows to come, with the first in view."""

    def __init__(self, windows: Iterator[_Wanted]) -> None:
        self._windows = windows
        self.head = next(windows, None)

    def advance(self) -> _Wanted:
        taken, self.head = self.head, next(self._windows, None)
        assert taken is not None
        return taken


class Prompts(Protocol):
    """Prompts by index, and their ids without reading them; a prompt set is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Prompt: ...

    def prompt_id(self, index: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderParts:
    """What a loader connects.

    :param planned: from a window's index, the batches that it and those after it need captured.
    """

    supply: Supply
    samples: SampleReader
    strategy: Strategy
    prompts: Prompts
    order: PromptOrder
    planned: Callable[[int], Iterator[PlannedBatch]]
    progress: Progress
    stop: StopSignal


class Loader:
    """Hands out a run's windows and takes them back when they are trained."""

    def __init__(self, parts: LoaderParts, *, plan: WindowPlan, settings: LoadingSection, seed: int) -> None:
        self.plan = plan
        self.supply = parts.supply
        self._parts = parts
        self._settings = settings
        self._seed = seed

    def windows(self, start: int = 0) -> Generator[Window]:
        """Windows ``start`` … ``plan.total_windows - 1``.

        :raises DeadlineExceeded: a sample did not come in time.
        :raises DataError: a sample will never come.
        :raises ChannelFailed: the capture half failed.
        :raises StoreError: a sample's features cannot be read; the sample is named.
        :raises RunStopped: the run was asked to stop; no window is lost by it.
        """
        self.supply.rewind(start)
        self.supply.want(self._parts.planned(start))
        with closing(Prefetcher[Window]("prefetch")) as prefetcher:
            wanted, ahead = _Upcoming(self._wanted(start)), list[_Wanted]()
            while prefetcher or wanted.head is not None:
                self._parts.stop.raise_if_requested()
                began = time.monotonic()
                if not prefetcher:
                    self._read_ahead(wanted, ahead, prefetcher=prefetcher, limit=1)
                oldest = prefetcher.take()
                self._read_ahead(wanted, ahead, prefetcher=prefetcher, limit=self._settings.prefetch_windows)
                window = self._await_window(ahead.pop(0), oldest, prefetcher)
                yield replace(window, waited_seconds=time.monotonic() - began)

    def acknowledge(self, window: Window) -> None:
        """The window is trained: its samples are no longer in flight, and freed if that was asked for."""
        self.supply.trained(window.index, window.refs)

    def _wanted(self, start: int) -> Iterator[_Wanted]:
        epoch_in_hand = -1
        order: Sequence[int] = ()
        for index in range(start, self.plan.total_windows):
            epoch, place = self.plan.place(index)
            if epoch != epoch_in_hand:
                epoch_in_hand, order = epoch, self._parts.order.epoch(epoch)
            prompts = order[place]
            keys = [self.supply.key(self._parts.prompts.prompt_id(prompt), epoch) for prompt in prompts]
            yield _Wanted(index, epoch, keys, prompts)

    def _read_ahead(
        self, upcoming: _Upcoming, ahead: list[_Wanted], *, prefetcher: Prefetcher[Window], limit: int
    ) -> None:
        """Hand windows whose refs have come to the prefetch thread, until ``limit`` are there; waits only for the one
        without which the trainer stands still."""
        while upcoming.head is not None and len(prefetcher) < limit:
            wanted = upcoming.head
            if not self._collect(wanted, patient=not ahead):
                return
            ahead.append(upcoming.advance())
            prefetcher.submit(self._loading(wanted, prefetcher))

    def _collect(self, wanted: _Wanted, *, patient: bool) -> bool:
        return self.supply.collect(wanted.keys, what=f"window {wanted.index}", patient=patient)

    def _loading(self, wanted: _Wanted, prefetcher: Prefetcher[Window]) -> Callable[[], Window]:
        return partial(self._load, wanted, self.supply.deal(wanted.index, wanted.keys), prefetcher)

    def _await_window(self, wanted: _Wanted, future: Future[Window], prefetcher: Prefetcher[Window]) -> Window:
        """The window, after whatever of it was gone has been captured again."""
        for _ in range(_RECAPTURES):
            try:
                return self._await(future)
            except _FeaturesLost as lost:
                if self.supply.reuses:
                    raise lost.error from None
                _log.warning("%d samples of window %d are captured again: %s", len(lost.lost), wanted.index, lost.error)
                self.supply.lost(lost.lost, intact=lost.intact)
                self._collect(wanted, patient=True)
                future = prefetcher.run(self._loading(wanted, prefetcher))
        try:
            return self._await(future)
        except _FeaturesLost as lost:
            raise lost.error from None

    def _await(self, future: Future[Window]) -> Window:
        deadline = time.monotonic() + self._settings.deadline_seconds
        while not wait([future], timeout=_TICK_SECONDS).done:
            self._parts.progress.waiting("features")
            self._parts.stop.raise_if_requested()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"reading a window's features took longer than {self._settings.deadline_seconds:g} s",
                    where=f"store {type(self._parts.samples.store).__name__}",
                    hint="see whether the store answers, or raise loading.deadline_seconds",
                )
        self._parts.progress.waiting(None)
        return future.result()

    def _load(self, wanted: _Wanted, refs: Sequence[SampleRef], prefetcher: Prefetcher[Window]) -> Window:
        """Read and collate this rank's share of a window; runs in the prefetch thread.

        Skipped samples have no features: they are members of the window that weigh nothing.
        """
        micro_batches, lost = [], dict[str, StoreError]()
        prompt_of = dict(zip(wanted.keys, wanted.prompts, strict=True))
        for cut in self.plan.cut([ref for ref in refs if not ref.skipped]):
            samples = []
            for ref in cut:
                try:
                    samples.append(self._read(ref, self._parts.prompts[prompt_of[ref.sample_id]], prefetcher))
                except _GONE as error:
                    lost[ref.sample_id] = error
            if not lost:
                seeds = [sample_seed(self._seed, wanted.epoch, ref.prompt_id) for ref in cut]
                micro_batches.append(self._parts.strategy.collate(samples, seeds))
        if lost:
            gone = [ref for ref in refs if ref.sample_id in lost]
            raise _FeaturesLost(gone, [ref for ref in refs if ref not in gone], next(iter(lost.values())))
        tokens = sum(ref.num_tokens for ref in refs)
        return Window(wanted.index, wanted.epoch, micro_batches, refs, tokens, waited_seconds=0.0)

    def _read(self, ref: SampleRef, prompt: Prompt, prefetcher: Prefetcher[Window]) -> Sample:
        """A sample's features; a store that does not answer is asked again a few times."""
        for pause in (*_RETRY_SECONDS, None):
            prefetcher.raise_if_closed()
            try:
                return self._parts.samples.read(ref, prompt)
            except StoreError as error:
                if pause is not None and not isinstance(error, _GONE):
                    prefetcher.wait(pause)
                    continue
                if ref.sample_id in str(error):
                    raise
                raise type(error)(error.message, where=f"sample {ref.sample_id}", hint=error.hint) from error
        raise AssertionError("the last attempt returns or raises")
