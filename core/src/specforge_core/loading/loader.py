# SPDX-License-Identifier: Apache-2.0
"""The loader: refs come in, windows of collated micro-batches go out, in prompt order.

The trainer's thread collects refs and hands every window whose refs have all come to a prefetch thread, which reads
the features and collates them, at most ``prefetch_windows`` ahead. The channel is used by the trainer's thread alone.
Every wait ends: with the sample, at the deadline, when the channel is drained, or when the run is asked to stop.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from specforge_core.contracts import (
    ChannelFailed,
    DataError,
    DeadlineExceeded,
    FeatureStore,
    Progress,
    RefReader,
    Sample,
    SampleRef,
    StopSignal,
    StoreError,
    Strategy,
)
from specforge_core.loading.order import PromptOrder, sample_seed
from specforge_core.loading.prefetch import Prefetcher
from specforge_core.loading.ref_book import RefBook
from specforge_core.loading.windows import Window, WindowPlan

if TYPE_CHECKING:
    from specforge_core.config.run_config import LoadingSection

Free = Literal["never", "window", "checkpoint"]

_TICK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A window whose refs are being collected."""

    index: int
    epoch: int
    keys: Sequence[str]


class _Upcoming:
    """The windows to come, with the first in view."""

    def __init__(self, windows: Iterator[_Wanted]) -> None:
        self._windows = windows
        self.head = next(windows, None)

    def advance(self) -> _Wanted:
        taken, self.head = self.head, next(self._windows, None)
        assert taken is not None
        return taken


class PromptIds(Protocol):
    """The prompts' ids by index; a prompt set is one."""

    def __len__(self) -> int: ...

    def prompt_id(self, index: int) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderParts:
    """What a loader connects.

    :param free: when features are deleted from the store: ``never``, once their ``window`` is trained, or once a
        ``checkpoint`` covers them.
    :param reuse_features: features are captured once and belong to no run: read again each epoch, never acked.
    """

    reader: RefReader
    store: FeatureStore
    strategy: Strategy
    prompts: PromptIds
    order: PromptOrder
    progress: Progress
    stop: StopSignal
    reuse_features: bool
    free: Free = "never"


class Loader:
    """Hands out a run's windows and takes them back when they are trained."""

    def __init__(self, parts: LoaderParts, *, plan: WindowPlan, settings: LoadingSection, seed: int) -> None:
        self.plan = plan
        self._parts = parts
        self._settings = settings
        self._seed = seed
        self._book = RefBook(parts.reader, reuse=parts.reuse_features)
        self._trained: list[SampleRef] = []

    def windows(self, start: int = 0) -> Generator[Window]:
        """Windows ``start`` … ``plan.total_windows - 1``.

        :raises DeadlineExceeded: a sample did not come in time.
        :raises DataError: a sample will never come.
        :raises ChannelFailed: the capture half failed.
        :raises StoreError: a sample's features are gone or corrupt; the sample is named.
        :raises RunStopped: the run was asked to stop; no window is lost by it.
        """
        with closing(Prefetcher[Window]("prefetch")) as prefetcher:
            wanted = _Upcoming(self._wanted(start))
            while prefetcher or wanted.head is not None:
                self._parts.stop.raise_if_requested()
                began = time.monotonic()
                if not prefetcher:
                    self._read_ahead(wanted, prefetcher=prefetcher, limit=1, patient=True)
                oldest = prefetcher.take()
                self._read_ahead(wanted, prefetcher=prefetcher, limit=self._settings.prefetch_windows, patient=False)
                window = self._await(oldest)
                yield replace(window, waited_seconds=time.monotonic() - began)

    def acknowledge(self, window: Window) -> None:
        """The window is trained: its samples are no longer in flight, and freed if that was asked for."""
        if self._parts.reuse_features:
            return
        self._parts.reader.ack([ref.sample_id for ref in window.refs], window.index + 1)
        if self._parts.free == "window":
            self._delete(window.refs)
        elif self._parts.free == "checkpoint":
            self._trained.extend(window.refs)

    def free_covered(self) -> None:
        """A checkpoint covers every window acknowledged so far."""
        self._delete(self._trained)
        self._trained = []

    def fail(self, reason: str) -> None:
        """Training cannot go on; capture, if it still runs, stops with this reason."""
        if not self._parts.reuse_features:
            self._parts.reader.fail(reason)

    def _delete(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            self._parts.store.delete(ref)

    def _wanted(self, start: int) -> Iterator[_Wanted]:
        epoch_in_hand = -1
        order: Sequence[int] = ()
        for index in range(start, self.plan.total_windows):
            epoch, place = self.plan.place(index)
            if epoch != epoch_in_hand:
                epoch_in_hand, order = epoch, self._parts.order.epoch(epoch)
            prompt_ids = [self._parts.prompts.prompt_id(i) for i in order[place]]
            yield _Wanted(index, epoch, [self._book.key(prompt_id, epoch) for prompt_id in prompt_ids])

    def _read_ahead(self, upcoming: _Upcoming, *, prefetcher: Prefetcher[Window], limit: int, patient: bool) -> None:
        """Hand windows whose refs have come to the prefetch thread, until ``limit`` are there."""
        while upcoming.head is not None and len(prefetcher) < limit and self._collect(upcoming.head, patient=patient):
            wanted = upcoming.advance()
            prefetcher.submit(partial(self._load, wanted, self._book.take(wanted.keys), prefetcher))

    def _collect(self, wanted: _Wanted, *, patient: bool) -> bool:
        """Read refs until all of a window's have come; False where they have not and we are not to wait."""
        missing = self._book.missing(wanted.keys)
        while missing and self._read(0.0):
            missing = self._book.missing(wanted.keys)
        if missing and patient:
            self._wait_for(wanted, missing)
            return True
        return not missing

    def _wait_for(self, wanted: _Wanted, missing: list[str]) -> None:
        deadline = time.monotonic() + self._settings.deadline_seconds
        self._parts.progress.waiting("features")
        while missing:
            self._parts.stop.raise_if_requested()
            drained = self._book.drained  # asked before reading, or what came in between would be missed
            if not self._read(0.0 if drained else _TICK_SECONDS):
                self._raise_if_hopeless(wanted, missing, drained=drained, late=time.monotonic() > deadline)
                continue
            still = self._book.missing(wanted.keys)
            if len(still) < len(missing):
                deadline = time.monotonic() + self._settings.deadline_seconds
            missing = still
        self._parts.progress.waiting(None)

    def _read(self, timeout: float) -> bool:
        try:
            return self._book.read(timeout)
        except ChannelFailed:
            self._parts.stop.raise_if_requested()  # capture was asked to stop too, and was quicker to say so
            raise

    def _raise_if_hopeless(self, wanted: _Wanted, missing: list[str], *, drained: bool, late: bool) -> None:
        came = f"{len(wanted.keys) - len(missing)} of {len(wanted.keys)} of window {wanted.index}"
        came += f", {self._book.arrived} refs in all"
        if drained:
            raise DataError(
                f"the features of this sample will never come: capture has ended and published {came}",
                where=f"sample {missing[0]}",
                hint="capture features from the same prompts, data settings and number of epochs as training uses",
            )
        if late:
            raise DeadlineExceeded(
                f"not captured within {self._settings.deadline_seconds:g} s; arrived so far: {came}",
                where=f"sample {missing[0]}",
                hint="see what the capture half is doing, or raise loading.deadline_seconds",
            )

    def _await(self, future: Future[Window]) -> Window:
        deadline = time.monotonic() + self._settings.deadline_seconds
        while not wait([future], timeout=_TICK_SECONDS).done:
            self._parts.progress.waiting("features")
            self._parts.stop.raise_if_requested()
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"reading a window's features took longer than {self._settings.deadline_seconds:g} s",
                    where=f"store {type(self._parts.store).__name__}",
                    hint="see whether the store answers, or raise loading.deadline_seconds",
                )
        self._parts.progress.waiting(None)
        return future.result()

    def _load(self, wanted: _Wanted, refs: Sequence[SampleRef], prefetcher: Prefetcher[Window]) -> Window:
        """Read and collate this rank's share of a window; runs in the prefetch thread."""
        micro_batches = []
        for cut in self.plan.cut(refs):
            samples = []
            for ref in cut:
                prefetcher.raise_if_closed()
                samples.append(self._get(ref))
            seeds = [sample_seed(self._seed, wanted.epoch, ref.prompt_id) for ref in cut]
            micro_batches.append(self._parts.strategy.collate(samples, seeds))
        tokens = sum(ref.num_tokens for ref in refs)
        return Window(wanted.index, wanted.epoch, micro_batches, refs, tokens, waited_seconds=0.0)

    def _get(self, ref: SampleRef) -> Sample:
        try:
            return self._parts.store.get(ref)
        except StoreError as error:
            if ref.sample_id in str(error):
                raise
            raise type(error)(error.message, where=f"sample {ref.sample_id}", hint=error.hint) from error
