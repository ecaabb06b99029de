# SPDX-License-Identifier: Apache-2.0
"""The capture loop, the same for every topology: batch → capture → verify → put → publish.

Batches are cut at absolute multiples of the batch size, so capturing again from any place repeats the same bits: the
batch that holds the first wanted prompt is captured whole, and what lies before it is not put. Published refs are
what the train role's loader reads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from specforge_core.capture.backpressure import Backpressure, Decision, Watermarks
from specforge_core.capture.verification import verify_batch
from specforge_core.contracts import (
    CaptureRequest,
    DeadlineExceeded,
    FeatureStore,
    InFlight,
    Progress,
    Prompt,
    RefWriter,
    SampleRef,
    StopSignal,
    TargetEngine,
)

_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureParts:
    """What the loop drives."""

    engine: TargetEngine
    request: CaptureRequest
    store: FeatureStore
    writer: RefWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureLimits:
    """How capture is paced.

    :param batch_size: prompts per prefill.
    :param watermarks: None offline: nothing is acked while it captures.
    :param deadline_seconds: longest wait for training to free anything.
    """

    batch_size: int
    watermarks: Watermarks | None = None
    deadline_seconds: float = 600.0


@dataclass(slots=True)
class CaptureCounts:
    """What one ``run`` did. ``seconds`` include ``waited_seconds``."""

    samples: int = 0
    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class CaptureLoop:
    """Captures one epoch's prompts after another; its owner closes or fails the writer."""

    def __init__(self, parts: CaptureParts, *, limits: CaptureLimits, progress: Progress, stop: StopSignal):
        self._parts = parts
        self._limits = limits
        self._progress = progress
        self._stop = stop
        self._backpressure = Backpressure(limits.watermarks) if limits.watermarks is not None else None

    def run(self, prompts: Sequence[Prompt], *, epoch: int, start: int = 0) -> CaptureCounts:
        """Capture ``prompts`` (already in the epoch's order) from ``start`` to their end.

        :raises TargetError: the engine failed, or gave back something else than it was asked for.
        :raises StoreFull: nothing of the batch at hand was kept.
        :raises ChannelFailed: the train side failed.
        :raises DeadlineExceeded: training freed nothing for too long.
        :raises RunStopped: a stop was requested.
        """
        counts, began = CaptureCounts(), time.monotonic()
        self._progress.begin(f"capturing epoch {epoch}", len(prompts) - start)
        size = self._limits.batch_size
        for first in range(start - start % size, len(prompts), size):
            counts.waited_seconds += self._wait_for_room()
            refs = self._capture(prompts[first : first + size], epoch=epoch, skip=max(start - first, 0))
            counts.samples += len(refs)
            counts.tokens += sum(ref.num_tokens for ref in refs)
            counts.nbytes += sum(ref.nbytes for ref in refs)
            counts.seconds = time.monotonic() - began
            busy = max(counts.seconds - counts.waited_seconds, 1e-9)
            self._progress.advance(len(refs), tokens_per_second=counts.tokens / busy)
        return counts

    def _capture(self, batch: Sequence[Prompt], *, epoch: int, skip: int) -> list[SampleRef]:
        """All of a batch is published, or none of it stays in the store."""
        parts, refs = self._parts, list[SampleRef]()
        samples = parts.engine.capture(batch, parts.request, epoch)
        hidden_size = parts.engine.info.hidden_size
        verified = verify_batch(samples, batch, request=parts.request, hidden_size=hidden_size, epoch=epoch)
        try:
            for index, sample in enumerate(verified):
                if index >= skip:
                    refs.append(parts.store.put(sample.sample_id, sample))
            parts.writer.publish(refs)
        except BaseException:
            for ref in refs:
                parts.store.delete(ref)
            raise
        return refs

    def _wait_for_room(self) -> float:
        """Seconds waited until the next batch may be captured."""
        self._stop.raise_if_requested()
        if self._backpressure is None:
            return 0.0
        began = changed = time.monotonic()
        in_flight = self._parts.writer.in_flight()
        while self._backpressure.observe(in_flight) is Decision.PAUSE:
            self._progress.waiting(f"training to catch up: {_describe(in_flight)}")
            self._stop.wait(_POLL_SECONDS)
            self._stop.raise_if_requested()
            before, in_flight = in_flight, self._parts.writer.in_flight()
            now = time.monotonic()
            if in_flight != before:
                changed = now
            elif now - changed > self._limits.deadline_seconds:
                raise DeadlineExceeded(
                    f"waited {now - changed:.0f} s for training to free any of {_describe(in_flight)}",
                    where="capture",
                    hint="see what the train role is doing; a slow window needs a longer deadline",
                )
        self._progress.waiting(None)
        return time.monotonic() - began


def _describe(in_flight: InFlight) -> str:
    return f"{in_flight.refs} samples in flight, {in_flight.nbytes / 2**20:.1f} MiB"
