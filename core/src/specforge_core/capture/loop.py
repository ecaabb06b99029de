# SPDX-License-Identifier: Apache-2.0
"""The capture loop, the same for every topology: take a lease → capture → verify → put → sign → publish → finish.

What is captured, and how far ahead of training, is decided by whoever offers leases; this loop only works them off. A
batch that cannot be captured is tried again, then prompt by prompt; a prompt that fails alone is set aside: it is
published as skipped, so that its window does not wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from specforge_core.capture.quiet import Quiet
from specforge_core.capture.verification import verify_batch
from specforge_core.contracts import (
    CaptureBatch,
    CaptureRequest,
    ChannelError,
    FeatureStore,
    Lease,
    LeaseDesk,
    PeerDied,
    Progress,
    Prompt,
    RefWriter,
    SampleRef,
    StopSignal,
    StoreFull,
    TargetEngine,
    TargetError,
    held_out_sample_id,
    sample_id,
    skipped_ref,
)

_TICK_SECONDS = 0.5
_RETRY_SECONDS = 0.5
_MOST_SET_ASIDE_IN_A_ROW = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureParts:
    """What the loop drives.

    :param prompts: a batch's prompts. Raises where this process's prompts, target or request are not the batch's.
    :param sign: signs a ref before it is published.
    :param holder: under this name ``writer`` is open and leases are taken.
    """

    engine: TargetEngine
    request: CaptureRequest
    store: FeatureStore
    writer: RefWriter
    desk: LeaseDesk
    prompts: Callable[[CaptureBatch], Sequence[Prompt]]
    sign: Callable[[SampleRef], SampleRef]
    holder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLimits:
    """How patient capture is.

    :param max_attempts: how often a batch is tried, in this process or any other, before its prompts are tried alone.
    :param deadline_seconds: longest wait for a lease while nothing else moves.
    :param room_seconds: longest wait for room in a full store; 0 where nothing frees any while this captures.
    """

    max_attempts: int
    deadline_seconds: float
    room_seconds: float


@dataclass(slots=True)
class CaptureCounts:
    """What one ``run`` did. ``seconds`` include ``waited_seconds``."""

    samples: int = 0
    tokens: int = 0
    nbytes: int = 0
    set_aside: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class CaptureLoop:
    """Works off leases; its owner closes or fails the writer."""

    def __init__(self, parts: CaptureParts, *, limits: CaptureLimits, progress: Progress, stop: StopSignal):
        self._parts = parts
        self._limits = limits
        self._progress = progress
        self._stop = stop
        self._set_aside_in_a_row = 0
        self._moved: float | None = None
        self.counts = CaptureCounts()

    @property
    def stuck_seconds(self) -> float:
        """How long nothing has moved while a batch is in this process's hands; 0 while there is none."""
        moved = self._moved
        return 0.0 if moved is None else time.monotonic() - moved

    def run(self, goes_on: Callable[[], bool]) -> CaptureCounts:
        """Capture until there is no lease to be had and ``goes_on`` says that there will be none.

        :raises TargetError: the engine failed at everything, or gave back something else than it was asked for.
        :raises StoreFull: there was no room for too long.
        :raises ChannelFailed: the train side failed.
        :raises DeadlineExceeded: nobody wanted anything for too long.
        :raises RunStopped: a stop was requested; what was leased is given back.
        """
        began, quiet = time.monotonic(), Quiet(self._limits.deadline_seconds)
        while True:
            self._stop.raise_if_requested()
            asked = time.monotonic()
            lease = self._parts.desk.take(self._parts.holder, _TICK_SECONDS)
            if lease is None and not goes_on():
                return self.counts
            self.counts.waited_seconds += time.monotonic() - asked
            if lease is None:
                self._progress.waiting(quiet.describe(self._parts.writer))
                self._stop.wait(asked + _TICK_SECONDS - time.monotonic())  # an ended desk does not wait
                continue
            self._progress.waiting(None)
            self._moved = time.monotonic()
            self._work_off(lease)
            self._moved = None
            quiet.renew()
            self.counts.seconds = time.monotonic() - began
            busy = max(self.counts.seconds - self.counts.waited_seconds, 1e-9)
            self._progress.advance(len(lease.batch.offsets), tokens_per_second=self.counts.tokens / busy)

    def _work_off(self, lease: Lease) -> None:
        batch = lease.batch
        try:
            prompts = self._parts.prompts(batch)
            if lease.attempt <= self._limits.max_attempts:
                self._publish(self._capture(batch, prompts, attempts=self._limits.max_attempts - lease.attempt + 1))
            elif batch.count > 1:
                # Processes died of it; alone, each of its prompts shows whether it is the one.
                self._offer_alone(batch)
            else:
                died = f"capture processes died of it {lease.attempt - 1} times"
                self._publish([self._set_aside(batch, prompts[0], reason=died)])
        except BaseException:
            with suppress(ChannelError):  # what happened first is what is told
                self._parts.desk.give_back(lease)
            raise
        self._parts.desk.finish(lease)

    def _offer_alone(self, batch: CaptureBatch) -> None:
        if self._parts.desk.ended is None:  # offering would open it again, and nobody would end it
            self._parts.desk.offer([_alone(batch, offset) for offset in batch.offsets])

    def _publish(self, refs: Sequence[SampleRef]) -> None:
        """All of a batch is published, or none of it stays in the store.

        When training ends it frees what was published until then; what comes later is freed here.
        """
        if self._parts.desk.ended is not None:
            self._delete(refs)
            return
        try:
            self._parts.store.sync()
            self._parts.writer.publish([self._parts.sign(ref) for ref in refs])
        except BaseException:
            self._delete(refs)
            raise
        if self._parts.desk.ended is not None:  # perhaps before this was published
            self._delete(refs)
        for ref in refs:
            self.counts.samples += not ref.skipped
            self.counts.tokens += ref.num_tokens
            self.counts.nbytes += ref.nbytes

    def _capture(self, batch: CaptureBatch, prompts: Sequence[Prompt], *, attempts: int) -> list[SampleRef]:
        """The batch's refs, features put; those of prompts that cannot be captured are skipped ones."""
        if self.counts.samples == 0:
            attempts = 1  # what never worked is more likely wrong than unlucky
        for attempt in range(attempts):
            try:
                refs = self._put(batch, prompts)
                self._set_aside_in_a_row = 0
                return refs
            except TargetError as error:
                failure = error
                _log.warning("capturing %s failed (attempt %d): %s", batch.key, attempt + 1, error)
                self._stop.wait(_RETRY_SECONDS * attempt)
                self._stop.raise_if_requested()
        if len(prompts) == 1 and self.counts.samples == 0:
            raise failure
        return self._capture_alone(batch, prompts, failure)

    def _capture_alone(self, batch: CaptureBatch, prompts: Sequence[Prompt], failure: TargetError) -> list[SampleRef]:
        refs = list[SampleRef]()
        try:
            for offset in batch.offsets:
                alone = _alone(batch, offset)
                try:
                    refs += self._put(alone, [prompts[offset]])
                    self._set_aside_in_a_row = 0
                except TargetError as error:
                    refs.append(self._set_aside(alone, prompts[offset], reason=str(error)))
            if self.counts.samples == 0 and all(ref.skipped for ref in refs):
                raise failure
            if self._set_aside_in_a_row >= _MOST_SET_ASIDE_IN_A_ROW:
                raise failure  # that many in a row are not the prompts' fault
        except BaseException:
            self._delete(refs)
            raise
        return refs

    def _set_aside(self, batch: CaptureBatch, prompt: Prompt, *, reason: str) -> SampleRef:
        self.counts.set_aside += 1
        self._set_aside_in_a_row += 1
        key = _sample_id(batch, prompt)
        _log.warning("sample %s is set aside, its window trains without it: %s", key, reason)
        return skipped_ref(key, prompt_id=prompt.prompt_id, epoch=batch.epoch)

    def _put(self, batch: CaptureBatch, prompts: Sequence[Prompt]) -> list[SampleRef]:
        """Capture a batch and put what is wanted of it: all or nothing."""
        parts, refs, wanted = self._parts, list[SampleRef](), set(batch.offsets)
        samples = parts.engine.capture(prompts, parts.request, batch.epoch)
        hidden_size = parts.engine.info.hidden_size
        verified = verify_batch(samples, prompts, request=parts.request, hidden_size=hidden_size, epoch=batch.epoch)
        try:
            for offset, sample in enumerate(verified):
                self._moved = time.monotonic()
                if offset in wanted:
                    key = _sample_id(batch, prompts[offset])
                    refs.append(self._when_there_is_room(partial(parts.store.put, key, sample)))
        except BaseException:
            self._delete(refs)
            raise
        return refs

    def _when_there_is_room(self, put: Callable[[], SampleRef]) -> SampleRef:
        """Put, waiting for training to free something where the store is full."""
        until = time.monotonic() + self._limits.room_seconds
        while True:
            try:
                return put()
            except StoreFull as error:
                if time.monotonic() >= until:
                    raise
                self._moved = time.monotonic()
                self._progress.waiting(f"room in the store: {error.message}")
                with suppress(PeerDied):
                    self._parts.writer.in_flight()  # raises where training has failed meanwhile
                self._stop.wait(_TICK_SECONDS)
                self._stop.raise_if_requested()

    def _delete(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            if not ref.skipped:
                self._parts.store.delete(ref)


def _alone(batch: CaptureBatch, offset: int) -> CaptureBatch:
    return replace(batch, first=batch.first + offset, count=1, wanted=())


def _sample_id(batch: CaptureBatch, prompt: Prompt) -> str:
    return sample_id(prompt.prompt_id, batch.epoch) if batch.split == "train" else held_out_sample_id(prompt.prompt_id)
