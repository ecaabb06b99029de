# SPDX-License-Identifier: Apache-2.0
"""The capture loop over leases and its verification, on the tiny target and the built-in memory parts."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from specforge_core.capture.loop import CaptureCounts, CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.capture.verification import verify_sample
from specforge_core.contracts import (
    CaptureBatch,
    CaptureRequest,
    ChannelFailed,
    DataError,
    DeadlineExceeded,
    PartContext,
    Prompt,
    RunStopped,
    SampleRef,
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


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", list(range(i, i + 4 + i % 3)), [0, 0, *([1] * (2 + i % 3))]) for i in range(count)]


class Counting(SilentProgress):
    def __init__(self) -> None:
        self.units, self.waits = 0, []

    def advance(self, units: int, **values: float) -> None:
        self.units += units

    def waiting(self, reason: str | None) -> None:
        self.waits.append(reason)


class Rig:
    """The two memory parts with a loop between them, and prompts to capture."""

    def __init__(self, tmp_path: Path, *, engine=None, capacity=None, prompts=None, sign=lambda ref: ref, **limits):
        context = PartContext(run_id="r", directory=tmp_path)
        self.store = MemoryStore(MemoryStoreConfig(name="memory", capacity_bytes=capacity), context)
        self.channel = MemoryChannel(MemoryChannelConfig(name="memory"), context)
        self.writer, self.reader, self.desk = self.channel.writer("w"), self.channel.reader(), self.channel.leases()
        self.progress, self.stop = Counting(), StopSignal()
        self.all_prompts = make_prompts(40)
        parts = CaptureParts(
            engine=engine or TinyTarget(),
            request=REQUEST,
            store=self.store,
            writer=self.writer,
            desk=self.desk,
            prompts=prompts or (lambda batch: self.all_prompts[batch.first : batch.first + batch.count]),
            sign=sign,
            holder="w",
        )
        limits = {"max_attempts": 3, "deadline_seconds": 20.0, "room_seconds": 20.0, **limits}
        self.loop = CaptureLoop(parts, limits=CaptureLimits(**limits), progress=self.progress, stop=self.stop)

    def offer(self, prompts: int, *, size: int = 3, **fields) -> None:
        fields = {"split": "train", "epoch": 0, **fields}
        for first in range(0, prompts, size):
            self.desk.offer([CaptureBatch(first=first, count=min(size, prompts - first), **fields)])

    def work(self) -> CaptureCounts:
        """Until everything offered is captured."""
        return self.loop.run(lambda: bool(self.desk.outstanding()))

    def refs(self):
        return self.reader.poll(1000, 0.0)

    def samples(self):
        return [self.store.get(ref) for ref in self.refs()]


def ids(refs) -> list[str]:
    return [ref.sample_id for ref in refs]


def test_every_prompt_is_captured_put_and_published_in_order(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.offer(8, epoch=2)
    counts = rig.work()
    samples = rig.samples()
    assert ids(samples) == [f"p{i}.e2" for i in range(8)]
    assert (counts.samples, counts.tokens) == (8, sum(prompt.num_tokens for prompt in rig.all_prompts[:8]))
    assert counts.nbytes == rig.store.usage().nbytes
    assert rig.progress.units == 8
    assert rig.desk.outstanding() == []


def test_only_what_is_wanted_of_a_batch_is_put_and_its_bits_are_those_of_the_whole(tmp_path: Path) -> None:
    whole, part = Rig(tmp_path), Rig(tmp_path)
    whole.offer(8)
    whole.work()
    part.desk.offer([CaptureBatch(split="train", epoch=0, first=3, count=3, wanted=(0, 2))])
    counts = part.work()
    expected = {sample.sample_id: sample for sample in whole.samples()}
    found = part.samples()
    assert ids(found) == ["p3.e0", "p5.e0"]
    assert counts.samples == part.progress.units == part.store.usage().samples == 2
    for sample in found:
        other = expected[sample.sample_id]
        assert all(torch.equal(sample.features[name], other.features[name]) for name in sample.features)


def test_held_out_samples_have_ids_of_their_own(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.offer(2, split="eval")
    rig.work()
    assert ids(rig.refs()) == ["p0.held-out", "p1.held-out"]


def test_refs_are_signed(tmp_path: Path) -> None:
    rig = Rig(tmp_path, sign=lambda ref: dataclasses.replace(ref, signature="mine"))
    rig.offer(3)
    rig.work()
    assert {ref.signature for ref in rig.refs()} == {"mine"}


def test_it_waits_for_offers_until_there_will_be_none(tmp_path: Path) -> None:
    rig = Rig(tmp_path)

    def train() -> None:
        rig.offer(4)
        taken = 0
        while taken < 4:
            taken += len(rig.reader.poll(10, 5.0))
        rig.desk.end("enough")

    trainer = threading.Timer(0.2, train)
    trainer.start()
    counts = rig.loop.run(lambda: rig.desk.ended is None)
    trainer.join(10)
    assert counts.samples == 4
    assert counts.waited_seconds > 0.1


def test_waiting_says_what_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.offer(3)
    timer = threading.Timer(1.0, rig.desk.end, ["enough"])
    timer.start()
    rig.loop.run(lambda: rig.desk.ended is None)
    assert any("training to want more: 3 samples in flight" in (reason or "") for reason in rig.progress.waits)


def test_a_wait_without_any_change_ends_at_the_deadline(tmp_path: Path) -> None:
    rig = Rig(tmp_path, deadline_seconds=0.2)
    with pytest.raises(DeadlineExceeded, match="nobody wanted anything captured"):
        rig.loop.run(lambda: True)


def test_waiting_at_a_desk_that_was_ended_does_not_ask_without_pause(tmp_path: Path) -> None:
    """As a capture process does that is started before the train role is started again."""
    rig = Rig(tmp_path)
    rig.desk.end("training was stopped")
    asked = []
    until = time.monotonic() + 0.4
    rig.loop.run(lambda: asked.append(1) or time.monotonic() < until)
    assert len(asked) <= 3


def test_a_stop_ends_a_wait_and_a_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    timer = threading.Timer(0.2, rig.stop.request, ["Ctrl-C"])
    timer.start()
    with pytest.raises(RunStopped, match="Ctrl-C"):
        rig.loop.run(lambda: True)
    busy = Rig(tmp_path)
    busy.offer(3)
    busy.stop.request("enough")
    with pytest.raises(RunStopped, match="enough"):
        busy.work()
    assert busy.store.usage().samples == 0


def test_a_failed_reader_ends_a_wait(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    timer = threading.Timer(0.2, rig.reader.fail, ["loss is NaN"])
    timer.start()
    with pytest.raises(ChannelFailed, match="loss is NaN"):
        rig.loop.run(lambda: True)


class Spoiled(TinyTarget):
    """Calls ``spoil`` with the prompts' ids before each capture."""

    def __init__(self, spoil: Callable[[list[str]], None]):
        super().__init__()
        self._spoil = spoil
        self.calls: list[list[str]] = []

    def capture(self, prompts, request, epoch):
        self.calls.append([prompt.prompt_id for prompt in prompts])
        self._spoil(self.calls[-1])
        return super().capture(prompts, request, epoch)


def poisoned(*names: str) -> Spoiled:
    def spoil(asked: list[str]) -> None:
        if found := [name for name in asked if name in names]:
            raise TargetError("the server crashed", where=f"sample {found[0]}")

    return Spoiled(spoil)


def test_a_batch_that_fails_is_tried_again(tmp_path: Path) -> None:
    failures = iter(["no", "yes", "yes", "no"])

    def spoil(asked: list[str]) -> None:
        if next(failures, "no") == "yes":
            raise TargetError("busy")

    rig = Rig(tmp_path, engine=Spoiled(spoil))
    rig.offer(9)
    counts = rig.work()
    assert counts.samples == 9
    assert counts.set_aside == 0
    assert [len(call) for call in rig.loop._parts.engine.calls] == [3, 3, 3, 3, 3]


def test_a_prompt_that_fails_alone_is_set_aside_and_published_as_skipped(tmp_path: Path) -> None:
    engine = poisoned("p4")
    rig = Rig(tmp_path, engine=engine, max_attempts=2)
    rig.offer(8)
    counts = rig.work()
    refs = rig.refs()
    assert ids(refs) == [f"p{i}.e0" for i in range(8)]
    assert [ref.sample_id for ref in refs if ref.skipped] == ["p4.e0"]
    assert (counts.samples, counts.set_aside) == (7, 1)
    assert rig.store.usage().samples == 7
    assert engine.calls[1:6] == [["p3", "p4", "p5"]] * 2 + [["p3"], ["p4"], ["p5"]]


def test_an_engine_that_never_worked_fails_at_once(tmp_path: Path) -> None:
    engine = poisoned(*[f"p{i}" for i in range(40)])
    rig = Rig(tmp_path, engine=engine)
    rig.offer(9)
    with pytest.raises(TargetError, match="the server crashed"):
        rig.work()
    assert engine.calls == [["p0", "p1", "p2"], ["p0"], ["p1"], ["p2"]]
    assert rig.refs() == []
    assert len(rig.desk.outstanding()) == 3
    alone = Rig(tmp_path, engine=poisoned("p0"))
    alone.offer(1)
    with pytest.raises(TargetError, match="the server crashed"):
        alone.work()


def test_a_first_prompt_that_cannot_be_captured_does_not_hide_that_others_can(tmp_path: Path) -> None:
    rig = Rig(tmp_path, engine=poisoned("p0"))
    rig.offer(3)
    assert rig.work().samples == 2
    assert [ref.skipped for ref in rig.refs()] == [True, False, False]


def test_eight_failures_in_a_row_are_not_the_prompts_fault(tmp_path: Path) -> None:
    rig = Rig(tmp_path, engine=poisoned(*[f"p{i}" for i in range(5, 40)]), max_attempts=1)
    rig.offer(40)
    with pytest.raises(TargetError, match="the server crashed"):
        rig.work()
    refs = rig.refs()
    assert [ref.sample_id for ref in refs if not ref.skipped] == [f"p{i}.e0" for i in range(5)]
    assert sum(ref.skipped for ref in refs) == 7, "the batch of the eighth is not published"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_many_failures_with_successes_between_them_are_only_set_aside(tmp_path: Path, size: int) -> None:
    rig = Rig(tmp_path, engine=poisoned(*[f"p{i}" for i in range(1, 40, 2)]), max_attempts=1)
    rig.offer(40, size=size)
    counts = rig.work()
    assert (counts.samples, counts.set_aside) == (20, 20)


def test_a_batch_that_processes_died_of_is_offered_prompt_by_prompt_then_set_aside(tmp_path: Path) -> None:
    asked: list[CaptureBatch] = []

    def prompts(batch: CaptureBatch) -> list[Prompt]:
        asked.append(batch)
        return make_prompts(3)[batch.first : batch.first + batch.count]

    rig = Rig(tmp_path, max_attempts=2, prompts=prompts)
    rig.offer(3)
    _die(rig, times=2)
    assert rig.work().samples == 3
    assert [(batch.first, batch.count) for batch in asked] == [(0, 3), (0, 1), (1, 1), (2, 1)]
    assert not any(ref.skipped for ref in rig.refs())


def test_a_single_prompt_that_processes_died_of_is_set_aside(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_attempts=2)
    rig.offer(1)
    _die(rig, times=2)
    assert rig.work().set_aside == 1
    [ref] = rig.refs()
    assert ref.skipped
    assert ref.sample_id == "p0.e0"


def _die(rig: Rig, *, times: int) -> None:
    """A process takes the next batch and ends without a word."""
    for attempt in range(times):
        name = f"dying-{attempt}"
        writer = rig.channel.writer(name)
        lease = rig.desk.take(name, 1.0)
        assert lease is not None
        assert lease.attempt == attempt + 1
        writer.fail("killed")
    rig.reader = rig.channel.reader()  # a failure is told to the reader of its time


def test_a_full_store_waits_for_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity=8000)
    rig.offer(20)

    def train() -> None:
        taken = 0
        while taken < 20:
            for ref in rig.reader.poll(2, 5.0):
                taken += 1
                time.sleep(0.01)
                rig.store.delete(ref)
                rig.reader.ack([ref.sample_id], step=1)

    trainer = threading.Thread(target=train)
    trainer.start()
    counts = rig.work()
    trainer.join(10)
    assert counts.samples == 20
    assert any("room in the store: " in (reason or "") for reason in rig.progress.waits)


def test_a_store_that_stays_full_ends_at_the_deadline_and_keeps_nothing_of_the_batch(tmp_path: Path) -> None:
    rig = Rig(tmp_path, capacity=8000, room_seconds=0.2)
    rig.offer(20)
    with pytest.raises(StoreFull):
        rig.work()
    samples = rig.samples()
    assert len(samples) % 3 == 0
    assert rig.store.usage().samples == len(samples) > 0
    assert min(batch.first for batch in rig.desk.outstanding()) == len(samples), "the lease came back"


@pytest.mark.parametrize("how", ["stop", "reader failed"])
def test_a_wait_for_room_ends_with_training(tmp_path: Path, how: str) -> None:
    rig = Rig(tmp_path, capacity=4000)
    rig.offer(20)
    end = {"stop": lambda: rig.stop.request("Ctrl-C"), "reader failed": lambda: rig.reader.fail("loss is NaN")}[how]
    timer = threading.Timer(0.3, end)
    timer.start()
    with pytest.raises(RunStopped if how == "stop" else ChannelFailed, match=r"Ctrl-C|loss is NaN"):
        rig.work()
    assert rig.store.usage().samples % 3 == 0


def test_what_cannot_be_published_does_not_stay_in_the_store(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.offer(3)
    rig.reader.fail("gone")
    with pytest.raises(ChannelFailed, match="gone"):
        rig.work()
    assert rig.store.usage().samples == 0


def test_a_batch_of_another_run_is_not_captured_and_goes_back(tmp_path: Path) -> None:
    def refuse(batch: CaptureBatch) -> list[Prompt]:
        raise DataError("planned with another target", where=f"batch {batch.key}")

    rig = Rig(tmp_path, prompts=refuse)
    rig.offer(3)
    with pytest.raises(DataError, match=r"batch train\.0\.0\+3: planned with another target"):
        rig.work()
    other = rig.channel.writer("other")
    lease = rig.desk.take("other", 1.0)
    assert lease is not None
    assert lease.attempt == 1, "what was given back does not count as an attempt"
    other.close()


def test_a_stop_between_attempts_gives_the_lease_back(tmp_path: Path) -> None:
    stops = []

    def spoil(asked: list[str]) -> None:
        if asked == ["p3", "p4", "p5"]:
            stops[0].request("Ctrl-C")
            raise TargetError("busy")

    rig = Rig(tmp_path, engine=Spoiled(spoil))
    stops.append(rig.stop)
    rig.offer(9)
    with pytest.raises(RunStopped):
        rig.work()
    assert [batch.first for batch in rig.desk.outstanding()] == [3, 6]
    rig.channel.writer("other")
    lease = rig.desk.take("other", 1.0)
    assert lease is not None
    assert (lease.batch.first, lease.attempt) == (3, 1)


class Broken(TinyTarget):
    """Breaks the sample of one prompt."""

    def __init__(self, change):
        super().__init__()
        self._change = change

    def capture(self, prompts, request, epoch):
        for sample in super().capture(prompts, request, epoch):
            features = dict(sample.features)
            if sample.prompt_id != "p1":
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
    "sample dropped": (lambda s, f: None, "1 prompts were given and 0 samples came back"),
    "other sample": (lambda s, f: dataclasses.replace(s, prompt_id="p5"), "sample p1: .*it is called p5.e0"),
    "other epoch": (lambda s, f: dataclasses.replace(s, epoch=7), "sample p1: .*it is called p1.e7"),
    "missing": (lambda s, f: f.pop("aux_hidden_states") is not None and s, "p1: .*aux_hidden_states missing"),
    "surplus": (lambda s, f: f.update(logits=torch.ones(5)) or s, "p1: .*logits not asked for"),
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
def test_what_was_not_asked_for_never_reaches_the_store(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = WRONG[case]
    rig = Rig(tmp_path, engine=Broken(change), max_attempts=1)
    rig.offer(3)
    rig.work()
    refs = rig.refs()
    assert [ref.skipped for ref in refs] == [False, True, False]
    assert rig.store.usage().samples == 2
    [said] = [record.getMessage() for record in caplog.records if "is set aside" in record.getMessage()]

    assert re.search(message, said), said


@pytest.mark.parametrize("case", list(WRONG))
def test_an_engine_that_always_gives_back_something_else_is_refused(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    rig = Rig(tmp_path, engine=Broken(change))
    rig.desk.offer([CaptureBatch(split="train", epoch=0, first=1, count=1)])
    with pytest.raises(TargetError, match=message):
        rig.work()
    assert rig.store.usage().samples == 0


def test_too_many_samples_are_refused(tmp_path: Path) -> None:
    class Generous(TinyTarget):
        def capture(self, prompts, request, epoch):
            yield from super().capture(prompts, request, epoch)
            yield from super().capture(prompts[:1], request, epoch)

    rig = Rig(tmp_path, engine=Generous())
    rig.offer(6)
    with pytest.raises(TargetError, match="prompts were given and more samples came back"):
        rig.work()
    assert rig.store.usage().samples == 0


def test_a_good_sample_passes() -> None:
    [prompt] = make_prompts(1)
    [sample] = TinyTarget().capture([prompt], REQUEST, 0)
    verify_sample(sample, prompt, request=REQUEST, hidden_size=32, epoch=0)


@pytest.mark.parametrize("moment", ["before it is published", "while it is published"])
def test_what_comes_after_the_end_of_training_is_not_left_in_the_store(moment: str, tmp_path: Path) -> None:
    """A process that stood still, say, while others captured its batch and training finished."""

    def prompts(batch: CaptureBatch) -> list[Prompt]:
        if moment == "before it is published":
            rig.desk.end("training has finished")
        return rig.all_prompts[batch.first : batch.first + batch.count]

    def sign(ref: SampleRef) -> SampleRef:
        rig.desk.end("training has finished")
        return ref

    rig = Rig(tmp_path, prompts=prompts, sign=sign)
    rig.offer(3)
    rig.work()
    assert rig.store.usage().samples == 0
    assert len(rig.refs()) == (0 if moment == "before it is published" else 3)
