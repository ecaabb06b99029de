# SPDX-License-Identifier: Apache-2.0
"""Training while another thread captures, over the built-in memory store and channel."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from specforge_core.contracts import ChannelFailed, PartContext, RefWriter, SpecForgeError, sample_id
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.features.memory_store import MemoryStore
from specforge_core.hooks.builtin import MemoryChannelConfig, MemoryStoreConfig
from specforge_core.loading.order import PromptOrder
from toy_run import ToyRun, make_sample, same_bits


class Capture(threading.Thread):
    """Puts and publishes every sample of the run, at most ``ahead`` in flight; may fail half-way."""

    def __init__(self, run: ToyRun, writer: RefWriter, *, ahead: int, fails_after: int | None = None) -> None:
        super().__init__(daemon=True)
        self._run, self._writer, self._ahead, self._fails_after = run, writer, ahead, fails_after
        self.ended_with: str | None = None

    def run(self) -> None:
        try:
            self._capture()
        except SpecForgeError as error:
            self.ended_with = str(error)

    def _capture(self) -> None:
        order = PromptOrder(self._run.prompts, seed=7, shuffle=True)
        samples = [(index, epoch) for epoch in range(self._run.epochs) for index in order.epoch(epoch)]
        for count, (index, epoch) in enumerate(samples):
            if count == self._fails_after:
                self._writer.fail("the target ran out of memory")
                return
            while self._writer.in_flight().refs >= self._ahead:
                time.sleep(0.001)
            ref = self._run.store.put(sample_id(f"p{index}", epoch), make_sample(index, epoch))
            self._writer.publish([ref])
        self._writer.close()


def _colocated(directory: Path, *, ahead: int, fails_after: int | None = None) -> tuple[ToyRun, Capture]:
    context = PartContext(run_id="test", directory=directory)
    channel = MemoryChannel(MemoryChannelConfig(name="memory"), context)
    store = MemoryStore(MemoryStoreConfig(name="memory"), context)
    run = ToyRun(directory=directory, store=store, reader=channel.reader(), reuse_features=False, free="window")
    capture = Capture(run, channel.writer("capture"), ahead=ahead, fails_after=fails_after)
    capture.start()
    return run, capture


@pytest.mark.parametrize("ahead", [4, 9, 100])
def test_how_far_capture_runs_ahead_does_not_change_a_bit(tmp_path: Path, ahead: int) -> None:
    offline = ToyRun(directory=tmp_path / "offline").weights()
    run, capture = _colocated(tmp_path / "online", ahead=ahead)
    assert same_bits(offline, run.weights())
    capture.join(timeout=10)
    assert not capture.is_alive()
    assert run.store.usage().samples == 0


def test_a_failed_capture_ends_training_with_its_reason(tmp_path: Path) -> None:
    run, capture = _colocated(tmp_path, ahead=100, fails_after=22)
    capture.join(timeout=10)
    with pytest.raises(ChannelFailed, match="the target ran out of memory"):
        run.trainer().fit()


def test_failed_training_ends_capture_with_its_reason(tmp_path: Path) -> None:
    run, capture = _colocated(tmp_path, ahead=8)
    trainer = run.trainer()
    trainer.step.optimizer.masters["inner.weight"].data.fill_(float("nan"))
    with pytest.raises(SpecForgeError, match="not finite in optimizer step 1"):
        trainer.fit()
    capture.join(timeout=10)
    assert "not finite in optimizer step 1" in (capture.ended_with or "")
