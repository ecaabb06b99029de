# SPDX-License-Identifier: Apache-2.0
"""The capture loop, its backpressure and its verification, on the tiny target and the built-in memory parts."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import pytest
import torch
from specforge_core.capture.backpressure import Backpressure, Watermarks
from specforge_core.capture.loop import CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.capture.verification import verify_sample
from specforge_core.contracts import (
    CaptureRequest,
    ChannelFailed,
    DeadlineExceeded,
    InFlight,
    PartContext,
    Prompt,
    RunStopped,
    SilentProgress,
    StopSignal,
    StoreFull,
    TargetError,
)
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.features.memory_store import MemoryStore
from specforge_core.hooks.builtin import MemoryChannelConfig, MemoryStoreConfig
from specforge_core.testing.tiny_target import TinyTarget

REQUEST = CaptureRequest((1, 3), "post")
GO, PAUSE = "go", "pause"


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", list(range(i, i + 4 + i % 3)), [0, 0, *([1] * (2 + i % 3))]) for i in range(count)]


class Counting(SilentProgress):
    def __init__(self) -> None:
        self.total, self.units, self.waits = 0, 0, []

    def begin(self, description: str, total: int | None) -> None:
        self.total = total

    def advance(self, units: int, **values: float) -> None:
        self.units += units

    def waiting(self, reason: str | None) -> None:
        self.waits.append(reason)


class Rig:
    """The two memory parts with a loop between them."""

    def __init__(self, tmp_path: Path, *, engine=None, capacity: int | None = None, **limits):
        context = PartContext(run_id="r", directory=tmp_path)
        self.store = MemoryStore(MemoryStoreConfig(name="memory", capacity_bytes=capacity), context)
        self.channel = MemoryChannel(MemoryChannelConfig(name="memory"), context)
        self.writer, self.reader = self.channel.writer("w"), self.channel.reader()
        self.progress, self.stop = Counting(), StopSignal()
        parts = CaptureParts(engine=engine or TinyTarget(), request=REQUEST, store=self.store, writer=self.writer)
        self.loop = CaptureLoop(
            parts, limits=CaptureLimits(**{"batch_size": 3, **limits}), progress=self.progress, stop=self.stop
        )

    def samples(self):
        return [self.store.get(ref) for ref in self.reader.poll(1000, 0.0)]


def test_every_prompt_is_captured_put_and_published_in_order(tmp_path: Path) -> None:
    rig, prompts = Rig(tmp_path), make_prompts(8)
    counts = rig.loop.run(prompts, epoch=2)
    samples = rig.samples()
    assert [sample.sample_id for sample in samples] == [f"p{i}.e2" for i in range(8)]
    assert (counts.samples, counts.tokens) == (8, sum(prompt.num_tokens for prompt in prompts))
    assert counts.nbytes == rig.store.usage().nbytes
    assert (rig.progress.total, rig.progress.units) == (8, 8)


@pytest.mark.parametrize("start", [1, 3, 5, 7, 8])
def test_capturing_again_from_anywhere_repeats_the_same_bits(start: int, tmp_path: Path) -> None:
    whole, again, prompts = Rig(tmp_path), Rig(tmp_path), make_prompts(8)
    whole.loop.run(prompts, epoch=0)
    counts = again.loop.run(prompts, epoch=0, start=start)
    expected = whole.samples()[start:]
    found = again.samples()
    assert [s.sample_id for s in found] == [s.sample_id for s in expected]
    assert counts.samples == again.progress.total == len(found) == 8 - start
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one.features[name], other.features[name]) for name in one.features)


def test_capture_waits_for_training_and_goes_on(tmp_path: Path) -> None:
    marks = Watermarks(high_watermark_refs=6, low_watermark_refs=3)
    rig = Rig(tmp_path, watermarks=marks)
    most = []

    def train() -> None:
        taken = 0
        while taken < 20:
            refs = rig.reader.poll(2, 5.0)
            most.append(rig.writer.in_flight().refs)
            taken += len(refs)
            time.sleep(0.01)
            rig.reader.ack([ref.sample_id for ref in refs], step=taken)

    trainer = threading.Thread(target=train)
    trainer.start()
    counts = rig.loop.run(make_prompts(20), epoch=0)
    trainer.join(10)
    assert not trainer.is_alive()
    assert counts.samples == 20
    assert counts.waited_seconds > 0
    assert max(most) < 6 + 3, "at most one batch beyond the high watermark"
    assert any("training to catch up: " in (reason or "") for reason in rig.progress.waits)
    assert rig.progress.waits[-1] is None


def test_a_wait_without_any_change_ends_at_the_deadline(tmp_path: Path) -> None:
    marks = Watermarks(high_watermark_refs=4, low_watermark_refs=2)
    rig = Rig(tmp_path, watermarks=marks, deadline_seconds=0.2)
    with pytest.raises(DeadlineExceeded, match="training to free any of 6 samples in flight"):
        rig.loop.run(make_prompts(20), epoch=0)


def test_a_stop_ends_a_wait_and_a_run(tmp_path: Path) -> None:
    marks = Watermarks(high_watermark_refs=4, low_watermark_refs=2)
    rig = Rig(tmp_path, watermarks=marks)
    timer = threading.Timer(0.2, rig.stop.request, ["Ctrl-C"])
    timer.start()
    with pytest.raises(RunStopped, match="Ctrl-C"):
        rig.loop.run(make_prompts(20), epoch=0)
    offline = Rig(tmp_path)
    offline.stop.request("enough")
    with pytest.raises(RunStopped, match="enough"):
        offline.loop.run(make_prompts(3), epoch=0)
    assert offline.store.usage().samples == 0


def test_a_failed_reader_ends_a_wait(tmp_path: Path) -> None:
    marks = Watermarks(high_watermark_refs=4, low_watermark_refs=2)
    rig = Rig(tmp_path, watermarks=marks)
    timer = threading.Timer(0.2, rig.reader.fail, ["loss is NaN"])
    timer.start()
    with pytest.raises(ChannelFailed, match="loss is NaN"):
        rig.loop.run(make_prompts(20), epoch=0)


def test_a_full_store_keeps_nothing_of_the_batch_at_hand(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity=8000)
    with pytest.raises(StoreFull):
        rig.loop.run(make_prompts(20), epoch=0)
    samples = rig.samples()
    assert len(samples) % 3 == 0
    assert rig.store.usage().samples == len(samples) > 0


class Broken(TinyTarget):
    """Breaks the sample of one prompt."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    def capture(self, prompts, request, epoch):
        for sample in super().capture(prompts, request, epoch):
            features = dict(sample.features)
            if sample.prompt_id != "p4":
                yield sample
            elif (changed := self._change(sample, features)) is not None:
                yield dataclasses.replace(changed, features=features)


def edit(**values):
    def change(sample, features):
        features.update({name: value(features[name]) for name, value in values.items()})
        return sample

    return change


def poison(value: float):
    def change(tensor):
        tensor[2, 0] = value
        return tensor

    return change


WRONG = {
    "sample dropped": (lambda s, f: None, "sample p3: 3 prompts|sample p4|batch from"),
    "other sample": (lambda s, f: dataclasses.replace(s, prompt_id="p5"), "sample p4: .*it is called p5.e0"),
    "other epoch": (lambda s, f: dataclasses.replace(s, epoch=7), "sample p4: .*it is called p4.e7"),
    "missing": (lambda s, f: f.pop("aux_hidden_states") is not None and s, "p4: .*aux_hidden_states missing"),
    "surplus": (lambda s, f: f.update(logits=torch.ones(5)) or s, "p4: .*logits not asked for"),
    "short": (
        edit(last_hidden_states=lambda t: t[:-1]),
        r"is float32 post-norm \[4, 32\], expected",
    ),
    "layers": (edit(aux_hidden_states=lambda t: t[:, :1]), r"aux_hidden_states is float32 \[5, 1, 32\], expected"),
    "dtype": (edit(last_hidden_states=lambda t: t.half()), "last_hidden_states is float16"),
    "norm": (lambda s, f: dataclasses.replace(s, last_hidden_norm="pre"), "float32 pre-norm .* expected float32 post"),
    "NaN": (edit(last_hidden_states=poison(float("nan"))), "last_hidden_states is not finite at token 2 "),
    "inf": (edit(aux_hidden_states=lambda t: t.index_fill(0, torch.tensor([1, 3]), torch.inf)), "1 .of 2 such tokens"),
    "tokens": (edit(input_ids=lambda t: t + 1), "input_ids are not the prompt's"),
    "mask": (edit(loss_mask=lambda t: ~t), "loss_mask is not the prompt's"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_was_not_asked_for_never_reaches_the_store(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    rig = Rig(tmp_path, engine=Broken(change))
    with pytest.raises(TargetError, match=message):
        rig.loop.run(make_prompts(8), epoch=0)
    assert [sample.prompt_id for sample in rig.samples()] == ["p0", "p1", "p2"]
    assert rig.store.usage().samples == 3, "nothing of the batch stays"


def test_too_many_samples_are_refused(tmp_path: Path) -> None:
    class Generous(TinyTarget):
        def capture(self, prompts, request, epoch):
            yield from super().capture(prompts, request, epoch)
            yield from super().capture(prompts[:1], request, epoch)

    with pytest.raises(TargetError, match="3 prompts were given and more samples came back"):
        Rig(tmp_path, engine=Generous()).loop.run(make_prompts(6), epoch=0)


def test_a_good_sample_passes() -> None:
    [prompt] = make_prompts(1)
    [sample] = TinyTarget().capture([prompt], REQUEST, 0)
    verify_sample(sample, prompt, request=REQUEST, hidden_size=32, epoch=0)


@pytest.mark.parametrize(
    ("marks", "observed"),
    [
        ((10, 4, None), [(0, 0, GO), (9, 0, GO), (10, 0, PAUSE), (9, 0, PAUSE), (4, 0, PAUSE), (3, 0, GO), (9, 0, GO)]),
        ((10, 4, None), [(50, 0, PAUSE), (4, 0, PAUSE), (0, 0, GO), (10, 0, PAUSE)]),
        ((10, 4, 100), [(5, 99, GO), (5, 100, PAUSE), (4, 10, PAUSE), (3, 10, GO), (3, 500, GO), (4, 500, PAUSE)]),
        ((2, 1, None), [(1, 0, GO), (2, 0, PAUSE), (1, 0, PAUSE), (0, 0, GO)]),
    ],
)
def test_backpressure_is_a_table(marks: tuple, observed: list[tuple[int, int, str]]) -> None:
    high, low, nbytes = marks
    machine = Backpressure(Watermarks(high_watermark_refs=high, low_watermark_refs=low, high_watermark_bytes=nbytes))
    assert [machine.observe(InFlight(refs, size)).value for refs, size, _ in observed] == [row[2] for row in observed]


@pytest.mark.parametrize(("high", "low", "nbytes"), [(4, 4, None), (4, 0, None), (3, 5, None), (4, 2, 0)])
def test_watermarks_that_cannot_work_are_refused(high: int, low: int, nbytes: int | None) -> None:
    with pytest.raises(ValueError, match=r"watermark|need 0"):
        Watermarks(high_watermark_refs=high, low_watermark_refs=low, high_watermark_bytes=nbytes)
