# SPDX-License-Identifier: Apache-2.0
"""The capture half of a toy run: a desk that captures at once, and the real loop in a thread over a toy engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from specforge_core.capture.loop import CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.contracts import (
    INPUT_IDS,
    LOSS_MASK,
    CaptureBatch,
    CaptureRequest,
    Lease,
    LeaseDesk,
    Prompt,
    RefChannel,
    Sample,
    SampleRef,
    SilentProgress,
    SpecForgeError,
    StopSignal,
    TargetDecoder,
    TargetEngine,
    TargetInfo,
    sample_id,
    skipped_ref,
)
from specforge_core.features.lease_book import LeaseBook
from specforge_core.testing.tiny_plugin import TinyTargetConfig
from toy_run import QueueReader, ToyRun
from toy_strategy import HIDDEN

REQUEST = CaptureRequest(aux_layer_ids=(0,))


class ListDesk(LeaseDesk):
    """Offers in a list; ``finish_all`` is what capture processes would do."""

    def __init__(self) -> None:
        self.book = LeaseBook()
        self.offered: list[CaptureBatch] = []

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        for batch in batches:
            if self.book.offer(batch):
                self.offered.append(batch)

    def take(self, holder: str, timeout: float) -> Lease | None:
        return self.book.take(holder)

    def finish_all(self) -> list[CaptureBatch]:
        done = []
        while (lease := self.take("test", 0.0)) is not None:
            self.finish(lease)
            done.append(lease.batch)
        return done

    def finish(self, lease: Lease) -> None:
        self.book.finish(lease)

    def give_back(self, lease: Lease) -> None:
        self.book.give_back(lease)

    def outstanding(self) -> list[CaptureBatch]:
        return self.book.outstanding()

    def end(self, reason: str) -> None:
        self.book.end(reason)

    @property
    def ended(self) -> str | None:
        return self.book.ended

    def close(self) -> None:
        pass


class InstantDesk(ListDesk):
    """Captures what is offered before ``offer`` returns.

    :param losing: called with every ref; one that it is True for is not published.
    :param skipping: prompt ids that cannot be captured.
    """

    def __init__(
        self, run: ToyRun, *, losing: Callable[[SampleRef], bool] = lambda ref: False, skipping: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._run = run
        self._losing = losing
        self._skipping = skipping
        self.captured: list[str] = []
        run.reader = run.reader or QueueReader(closed=False)

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        super().offer(batches)
        for batch in self.finish_all():
            refs = [self._capture(batch, offset) for offset in batch.offsets]
            assert isinstance(self._run.reader, QueueReader)
            self._run.reader.publish([ref for ref in refs if not self._losing(ref)])

    def _capture(self, batch: CaptureBatch, offset: int) -> SampleRef:
        index = self._run.order.epoch(batch.epoch)[batch.first + offset]
        key = sample_id(f"p{index}", batch.epoch)
        self.captured.append(key)
        if f"p{index}" in self._skipping:
            return skipped_ref(key, prompt_id=f"p{index}", epoch=batch.epoch)
        return self._run.store.put(key, self._run.make_sample(index, batch.epoch))


class ToyEngine(TargetEngine):
    """Gives the run's toy samples back."""

    def __init__(self, run: ToyRun) -> None:
        self._run = run

    @property
    def info(self) -> TargetInfo:
        return replace(TinyTargetConfig().describe(), hidden_size=HIDDEN)

    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        for prompt in prompts:
            yield self._run.make_sample(int(prompt.prompt_id[1:]), epoch)

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        raise NotImplementedError

    def decoder(self, request: CaptureRequest) -> TargetDecoder:
        raise NotImplementedError

    def health(self) -> None:
        pass

    def close(self) -> None:
        pass


class Capture(threading.Thread):
    """The real capture loop, until the desk is ended; ``ended_with`` is why it failed, if it did."""

    def __init__(self, run: ToyRun, channel: RefChannel, *, engine: TargetEngine | None = None) -> None:
        super().__init__(name="capture", daemon=True)
        self._run = run
        self._writer = channel.writer("capture")
        self._desk = channel.leases()
        self.stop = StopSignal()
        self.ended_with: str | None = None
        parts = CaptureParts(
            engine=engine or ToyEngine(run),
            request=REQUEST,
            store=run.store,
            writer=self._writer,
            desk=self._desk,
            prompts=self._prompts,
            sign=lambda ref: ref,
            holder="capture",
        )
        limits = CaptureLimits(max_attempts=2, deadline_seconds=20.0, room_seconds=20.0)
        self.loop = CaptureLoop(parts, limits=limits, progress=SilentProgress(), stop=self.stop)

    def run(self) -> None:
        try:
            self.loop.run(lambda: self._desk.ended is None)
        except SpecForgeError as error:
            self.ended_with = str(error)
            self._writer.fail(str(error))
        else:
            self._writer.close()

    def _prompts(self, batch: CaptureBatch) -> list[Prompt]:
        order = self._run.order.epoch(batch.epoch)[batch.first : batch.first + batch.count]
        return [_prompt(self._run.make_sample(index, batch.epoch)) for index in order]


def _prompt(sample: Sample) -> Prompt:
    return Prompt(sample.prompt_id, sample.features[INPUT_IDS].tolist(), sample.features[LOSS_MASK].int().tolist())
