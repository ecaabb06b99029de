# SPDX-License-Identifier: Apache-2.0
"""Training while another thread captures what it wants, over the built-in memory store and channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from specforge_core.contracts import (
    CaptureRequest,
    ChannelFailed,
    PartContext,
    Prompt,
    Sample,
    SpecForgeError,
    StopSignal,
    TargetError,
)
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.features.memory_store import MemoryStore
from specforge_core.hooks.builtin import MemoryChannelConfig, MemoryStoreConfig
from specforge_core.loading.backpressure import Watermarks
from toy_capture import Capture, ToyEngine
from toy_run import ToyRun, make_sample, same_bits
from training_recorder import Recorder

MOST_BYTES = max(sum(spec.nbytes for spec in make_sample(index).specs()) for index in range(14))
TWO_WINDOWS_AND_A_BATCH = (2 * 4 + 3) * MOST_BYTES  # the least that `plan` lets a byte watermark be


class Failing(ToyEngine):
    """Works for so many prompts, then never again."""

    def __init__(self, run: ToyRun, *, after: int) -> None:
        super().__init__(run)
        self._left = after

    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        self._left -= len(prompts)
        if self._left < 0:
            raise TargetError("the target ran out of memory")
        return super().capture(prompts, request, epoch)


def _colocated(directory: Path, **settings: object) -> tuple[ToyRun, MemoryChannel]:
    context = PartContext(run_id="test", directory=directory)
    channel = MemoryChannel(MemoryChannelConfig(name="memory"), context)
    settings = {"store": MemoryStore(MemoryStoreConfig(name="memory"), context), "free": "window", **settings}
    run = ToyRun(directory=directory, reader=channel.reader(), desk=channel.leases(), reuse_features=False, **settings)
    return run, channel


def _end(run: ToyRun, capture: Capture) -> None:
    assert run.desk is not None
    run.desk.end("training has finished")
    capture.join(timeout=10)
    assert not capture.is_alive()


@pytest.mark.parametrize(("high", "low"), [(8, 4), (11, 5), (100, 50)])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_how_far_and_in_what_batches_capture_runs_ahead_does_not_change_a_bit(
    tmp_path: Path, high: int, low: int, batch: int
) -> None:
    offline = ToyRun(directory=tmp_path / "offline").weights()
    watermarks = Watermarks(high_watermark_refs=high, low_watermark_refs=low)
    run, channel = _colocated(tmp_path / "online", watermarks=watermarks, capture_batch_size=batch)
    capture = Capture(run, channel)
    capture.start()
    assert same_bits(offline, run.weights())
    _end(run, capture)
    assert run.store.usage().samples == 0
    assert capture.loop.counts.samples == 3 * 14


@pytest.mark.parametrize("free", ["window", "checkpoint"])
@pytest.mark.parametrize("after", [1, 3, 7])
def test_stopped_and_resumed_with_other_wires_it_ends_with_the_same_bits(tmp_path: Path, after: int, free: str) -> None:
    """A colocated run's wires die with it; what was captured ahead is captured again."""
    whole = ToyRun(directory=tmp_path / "whole").weights()
    stop = StopSignal()
    run, channel = _colocated(tmp_path / "cut", stop=stop, observers=(Recorder(stop, after),), free=free)
    capture = Capture(run, channel)
    capture.start()
    assert run.trainer().fit() == "stopped"
    _end(run, capture)
    run, channel = _colocated(tmp_path / "cut", free=free)
    capture = Capture(run, channel)
    capture.start()
    assert same_bits(whole, run.weights())
    _end(run, capture)
    assert run.store.usage().samples == 0


@pytest.mark.parametrize("checkpoint_every", [1, 3, 1000])
def test_a_byte_watermark_of_two_windows_suffices_however_rare_checkpoints_are(
    tmp_path: Path, checkpoint_every: int
) -> None:
    """Trained features are kept for a checkpoint; it is written early where they leave no room."""
    recorder = Recorder()
    watermarks = Watermarks(high_watermark_refs=16, low_watermark_refs=8, high_watermark_bytes=TWO_WINDOWS_AND_A_BATCH)
    run, channel = _colocated(
        tmp_path, watermarks=watermarks, free="checkpoint", checkpoint_every=checkpoint_every, observers=(recorder,)
    )
    most: list[int] = []
    put = run.store.put

    def watched(key: str, sample: Sample) -> object:
        ref = put(key, sample)
        most.append(run.store.usage().nbytes)
        return ref

    run.store.put = watched  # type: ignore[method-assign, assignment]
    capture = Capture(run, channel)
    capture.start()
    whole = ToyRun(directory=tmp_path / "whole").weights()
    assert same_bits(whole, run.weights())
    _end(run, capture)
    assert max(most) <= TWO_WINDOWS_AND_A_BATCH
    assert run.store.usage().samples == 0
    assert recorder.events[-2:] == ["saved 12", "finished"]
    saved = [event for event in recorder.events if event.startswith("saved")]
    assert len(saved) == {1: 12, 3: 4, 1000: 3}[checkpoint_every]


def test_a_store_with_less_room_than_the_watermarks_gets_it_from_an_early_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.loading.supply._RELIEF_SECONDS", 0.1)
    section = MemoryStoreConfig(name="memory", capacity_bytes=TWO_WINDOWS_AND_A_BATCH)
    store = MemoryStore(section, PartContext(run_id="test", directory=tmp_path))
    run, channel = _colocated(tmp_path / "small", store=store, free="checkpoint", checkpoint_every=1000)
    capture = Capture(run, channel)
    capture.start()
    assert same_bits(ToyRun(directory=tmp_path / "whole").weights(), run.weights())
    _end(run, capture)
    assert run.store.usage().samples == 0


def test_a_failed_capture_ends_training_with_its_reason(tmp_path: Path) -> None:
    run, channel = _colocated(tmp_path)
    capture = Capture(run, channel, engine=Failing(run, after=22))
    capture.start()
    with pytest.raises(ChannelFailed, match="the target ran out of memory"):
        run.trainer().fit()
    capture.join(timeout=10)
    assert "out of memory" in (capture.ended_with or "")


def test_failed_training_ends_capture_with_its_reason(tmp_path: Path) -> None:
    run, channel = _colocated(tmp_path)
    capture = Capture(run, channel)
    capture.start()
    trainer = run.trainer()
    trainer.step.optimizer.masters["inner.weight"].data.fill_(float("nan"))
    with pytest.raises(SpecForgeError, match="not finite in optimizer step 1"):
        trainer.fit()
    capture.join(timeout=10)
    assert "not finite in optimizer step 1" in (capture.ended_with or "")
