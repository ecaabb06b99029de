# SPDX-License-Identifier: Apache-2.0
"""The train role's end of the wires: what it takes in, what it refuses, what it asks for again, and when waits end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    DataError,
    DeadlineExceeded,
    PeerDied,
    RunStopped,
    SampleRef,
    check_signature,
    sign,
    skipped_ref,
)
from specforge_core.features.ledger import Ledger
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.supply import Supply
from toy_capture import InstantDesk, ListDesk
from toy_run import DictStore, QueueReader, ToyRun, make_sample

TOKEN = "a secret of thirty-two characters"


def online(directory: Path, **settings: object) -> ToyRun:
    """A run of two windows of four, whose desk captures whatever it is asked for."""
    values = {"prompts": 8, "epochs": 1, "reuse_features": False, "free": "window", **settings}
    run = ToyRun(directory=directory, **values)
    run.desk = run.desk or InstantDesk(run)
    return run


def keys(run: ToyRun, window: int = 0) -> list[str]:
    epoch, place = run.plan.place(window)
    return [f"p{index}.e{epoch}" for index in run.order.epoch(epoch)[place]]


def begin(run: ToyRun, *, step: int = 0, deadline_seconds: float = 20.0) -> Supply:
    supply = run.supply(deadline_seconds)
    supply.rewind(step)
    supply.want(run.planned(step))
    return supply


def train(supply: Supply, run: ToyRun, window: int) -> list[SampleRef]:
    supply.collect(keys(run, window), what=f"window {window}", patient=True)
    refs = supply.deal(window, keys(run, window))
    supply.trained(window, refs)
    return refs


def ledger(run: ToyRun) -> Ledger:
    return Ledger(run.directory / "ledger.sqlite", run_id="toy")


def reader(run: ToyRun) -> QueueReader:
    assert isinstance(run.reader, QueueReader)
    return run.reader


def captured(run: ToyRun) -> list[str]:
    assert isinstance(run.desk, InstantDesk)
    return run.desk.captured


def test_a_window_is_asked_for_taken_trained_and_freed(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    assert captured(run) == keys(run, 0) + keys(run, 1)
    for window in range(2):
        refs = train(supply, run, window)
        assert [ref.sample_id for ref in refs] == keys(run, window)
    assert run.store.usage().samples == 0
    assert reader(run).acked == [(key, window + 1) for window in range(2) for key in keys(run, window)]
    assert [(window, key) for window, key, _, _ in ledger(run).deals()] == [
        (window, key) for window in range(2) for key in keys(run, window)
    ]


def test_collecting_impatiently_says_what_is_there(tmp_path: Path) -> None:
    run = online(tmp_path, desk=ListDesk(), reader=QueueReader(closed=False))
    supply = begin(run)
    assert not supply.collect(keys(run), what="window 0", patient=False)
    reader(run).publish([run.store.put(key, make_sample(int(key[1:-3]))) for key in keys(run)])
    assert supply.collect(keys(run), what="window 0", patient=False)


def test_a_ref_that_comes_twice_is_one_sample(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    refs = reader(run)._refs[:4]
    reader(run).publish(refs)
    assert train(supply, run, 0) == refs
    reader(run).publish(refs)
    train(supply, run, 1)
    assert run.store.usage().samples == 0
    assert len(list(ledger(run).deals())) == 8


def test_a_ref_that_comes_twice_while_its_window_is_being_read_is_left_alone(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    supply.collect(keys(run), what="window 0", patient=True)
    refs = supply.deal(0, keys(run))
    reader(run).publish(refs)
    supply.collect(keys(run, 1), what="window 1", patient=True)
    assert reader(run).acked == []
    assert all(run.store.get(ref) is not None for ref in refs)


def test_a_surplus_ref_of_a_freed_sample_is_acked_and_its_features_deleted(tmp_path: Path) -> None:
    """Its capture process was taken for dead, and was not."""
    run = online(tmp_path)
    supply = begin(run)
    train(supply, run, 0)
    late = run.store.put(keys(run)[0], make_sample(1))
    reader(run).publish([late])
    train(supply, run, 1)
    supply.discard_rest()
    assert run.store.usage().samples == 0
    assert (late.sample_id, 0) in reader(run).acked


def test_what_comes_again_of_a_trained_sample_is_acked_and_freed_with_it(tmp_path: Path) -> None:
    run = online(tmp_path, free="checkpoint")
    supply = begin(run)
    train(supply, run, 0)
    late = run.store.put(keys(run)[0], make_sample(1))
    reader(run).publish([late])
    train(supply, run, 1)
    supply.discard_rest()
    assert (late.sample_id, 0) in reader(run).acked
    assert run.store.usage().samples == 8
    supply.free_covered(2)
    assert run.store.usage().samples == 0


def test_a_newer_generation_of_a_dealt_sample_takes_its_place_once_the_old_one_is_lost(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    supply.collect(keys(run), what="window 0", patient=True)
    old = supply.deal(0, keys(run))
    newer = run.store.put(old[0].sample_id, make_sample(1))
    reader(run).publish([newer])
    assert supply.collect(keys(run, 1), what="window 1", patient=True)
    before = list(captured(run))
    supply.lost(old[:1], intact=old[1:])
    assert captured(run) == before, "a newer one came already"
    supply.collect(keys(run), what="window 0", patient=True)
    assert supply.deal(0, keys(run)) == [newer, *old[1:]]


def test_a_newer_generation_that_comes_while_the_older_is_trained_is_freed_with_it(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    supply.collect(keys(run), what="window 0", patient=True)
    old = supply.deal(0, keys(run))
    reader(run).publish([run.store.put(ref.sample_id, make_sample(1)) for ref in old])
    assert not supply.collect(["whatever is there"], what="a look at the channel", patient=False)
    supply.trained(0, old)
    assert run.store.usage().samples == 4, "those of window 1"


def test_what_nobody_wanted_is_freed_at_the_end(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    for window in range(2):
        train(supply, run, window)
    reader(run).publish([run.store.put(f"p{index}.e1", make_sample(index, 1)) for index in range(3)])
    supply.discard_rest()
    assert run.store.usage().samples == 0
    assert [key for key, step in reader(run).acked if step == 0] == ["p0.e1", "p1.e1", "p2.e1"]


def test_lost_features_are_captured_again(tmp_path: Path) -> None:
    run = online(tmp_path)
    supply = begin(run)
    supply.collect(keys(run), what="window 0", patient=True)
    refs = supply.deal(0, keys(run))
    run.store.delete(refs[2])
    captured(run).clear()
    supply.lost([refs[2]], intact=[ref for ref in refs if ref != refs[2]])
    assert captured(run) == [refs[2].sample_id]
    supply.collect(keys(run), what="window 0", patient=True)
    again = supply.deal(0, keys(run))
    assert [ref.generation for ref in again] == [1, 1, 2, 1]
    assert run.store.get(again[2]).prompt_id == refs[2].prompt_id


def test_what_was_published_and_not_yet_read_is_not_lost(tmp_path: Path) -> None:
    """The second window's refs lie in the channel when a sample of the first turns out to be gone."""
    run = online(tmp_path)
    reader(run)
    supply = begin(run)
    ahead = [ref for ref in reader(run)._refs if ref.sample_id in keys(run, 1)]
    reader(run)._refs = [ref for ref in reader(run)._refs if ref not in ahead]
    supply.collect(keys(run), what="window 0", patient=True)
    refs = supply.deal(0, keys(run))
    reader(run).publish(ahead)
    run.store.delete(refs[0])
    captured(run).clear()
    supply.lost(refs[:1], intact=refs[1:])
    assert captured(run) == [refs[0].sample_id]


def test_what_the_channel_lost_is_asked_for_again(tmp_path: Path) -> None:
    run = online(tmp_path)
    lost = set(keys(run)[1:3])

    def losing(ref: SampleRef) -> bool:
        return ref.sample_id in lost and not lost.discard(ref.sample_id)

    run.desk = InstantDesk(run, losing=losing)
    supply = begin(run)
    refs = train(supply, run, 0)
    assert [ref.sample_id for ref in refs] == keys(run)
    assert captured(run)[-2:] == keys(run)[1:3]


def test_a_sample_that_is_lost_each_time_ends_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_core.loading.patience._HEAL_SECONDS", 0.02)
    run = online(tmp_path)
    unlucky = keys(run)[1]
    run.desk = InstantDesk(run, losing=lambda ref: ref.sample_id == unlucky)
    supply = begin(run)
    with pytest.raises(DataError, match=rf"sample {unlucky}: offered for capture 6 times"):
        train(supply, run, 0)


def test_a_missing_sample_is_named_at_the_deadline(tmp_path: Path) -> None:
    run = online(tmp_path, desk=ListDesk(), reader=QueueReader(closed=False))
    supply = begin(run, deadline_seconds=0.2)
    reader(run).publish([run.store.put(keys(run)[0], make_sample(1))])
    with pytest.raises(DeadlineExceeded, match=rf"sample {keys(run)[1]}: not captured within 0.2 s; arrived so far: 1"):
        supply.collect(keys(run), what="window 0", patient=True)


def test_offline_a_drained_channel_tells_at_once(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, prompts=8, epochs=1)
    refs = run.publish_all()
    run.reader = QueueReader(refs[:2])
    supply = begin(run, deadline_seconds=60)
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"sample {refs[2].sample_id}.*never come.*2 of 4 of window 0, 2 refs in all"):
        supply.collect(keys(run), what="window 0", patient=True)
    assert time.monotonic() - began < 2


class Dead(QueueReader):
    """Nobody captures until somebody does."""

    dead = True

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        if self.dead:
            raise PeerDied("ended without closing", where="writer gpu-7")
        return super().poll(max_refs, timeout)


def test_the_death_of_every_capture_process_is_waited_out(tmp_path: Path) -> None:
    dead = Dead(closed=False)
    run = online(tmp_path, reader=dead)
    supply = begin(run)
    timer = threading.Timer(0.3, partial(setattr, dead, "dead", False))
    timer.start()
    assert len(train(supply, run, 0)) == 4
    timer.join()


def test_a_death_that_nobody_makes_good_is_told_at_the_deadline(tmp_path: Path) -> None:
    run = online(tmp_path, reader=Dead(closed=False))
    supply = begin(run, deadline_seconds=0.3)
    with pytest.raises(DeadlineExceeded, match="no capture process is alive: ended without closing"):
        train(supply, run, 0)


def test_offline_a_death_is_an_error(tmp_path: Path) -> None:
    supply = begin(ToyRun(directory=tmp_path, reader=Dead()))
    with pytest.raises(PeerDied, match="gpu-7"):
        supply.collect(["p0.e0"], what="window 0", patient=True)


@pytest.mark.parametrize("also_stopped", [False, True])
def test_a_failed_capture_is_told_unless_the_run_was_stopped(tmp_path: Path, also_stopped: bool) -> None:
    class Failed(QueueReader):
        def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
            raise ChannelFailed("out of memory")

    run = online(tmp_path, reader=Failed(closed=False))
    if also_stopped:
        run.stop.request("Ctrl-C")
    with pytest.raises(RunStopped if also_stopped else ChannelFailed, match=r"out of memory|Ctrl-C"):
        begin(run)


FORGED: dict[str, tuple[Callable[[SampleRef], SampleRef], str]] = {
    "unsigned": (lambda ref: ref, "is not signed"),
    "another token": (partial(sign, token="not the secret at all", run_id="toy"), "token did not make"),
    "another run": (partial(sign, token=TOKEN, run_id="other"), "token did not make"),
    "altered": (lambda ref: replace(sign(ref, token=TOKEN, run_id="toy"), generation=9), "token did not make"),
}


@pytest.mark.parametrize("case", list(FORGED))
def test_a_forged_ref_is_passed_over_by_name_and_not_trained(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    forge, said = FORGED[case]
    run = online(tmp_path, check=partial(check_signature, token=TOKEN, run_id="toy"), desk=ListDesk())
    good = [sign(run.store.put(key, make_sample(1)), token=TOKEN, run_id="toy") for key in keys(run)]
    forged = replace(forge(replace(good[2], signature="")), origin="refs/stranger.refs, offset 7")
    run.reader = QueueReader([*good[:2], forged, good[3]], closed=False)
    supply = begin(run)
    assert not supply.collect(keys(run), what="window 0", patient=False), "the forged ref does not count"
    assert f"sample {forged.sample_id} (refs/stranger.refs, offset 7): " in caplog.text
    assert said in caplog.text
    run.reader.publish([good[2]])
    assert supply.collect(keys(run), what="window 0", patient=True), "the honest one of the same sample does"
    assert supply.deal(0, keys(run)) == good
    assert run.reader.acked == [], "acking what was passed over would ack the honest ref with it"


def test_a_wait_that_ends_says_what_was_passed_over(tmp_path: Path) -> None:
    run = online(tmp_path, check=partial(check_signature, token=TOKEN, run_id="toy"), desk=ListDesk())
    run.reader = QueueReader([run.store.put(key, make_sample(1)) for key in keys(run)], closed=False)
    supply = begin(run, deadline_seconds=0.3)
    with pytest.raises(DeadlineExceeded, match=r"4 refs were passed over, the last: sample .* is not signed"):
        supply.collect(keys(run), what="window 0", patient=True)


def test_many_forged_refs_do_not_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = online(tmp_path, check=partial(check_signature, token=TOKEN, run_id="toy"), desk=ListDesk())
    run.reader = QueueReader([run.store.put(f"p{n}.e0", make_sample(1)) for n in range(500)], closed=False)
    begin(run)
    assert len(caplog.records) < 12


def test_a_resumed_session_goes_on_with_what_is_still_there(tmp_path: Path) -> None:
    first = online(tmp_path, free="checkpoint")
    supply = begin(first)
    train(supply, first, 0)
    supply.collect(keys(first, 1), what="window 1", patient=True)
    supply.deal(1, keys(first, 1))
    second = online(tmp_path, free="checkpoint", store=first.store)
    supply = begin(second, step=1)
    assert captured(second) == [], "window 1 was dealt and not trained: its features wait"
    assert first.store.usage().samples == 4, "the checkpoint covers window 0"
    train(supply, second, 1)
    assert [trained for *_, trained in ledger(second).deals()] == [True] * 8


def test_what_a_checkpoint_covers_is_acked_though_it_was_read_before_that_was_known(tmp_path: Path) -> None:
    run = online(tmp_path, free="checkpoint")
    supply = begin(run)
    supply.collect(keys(run), what="window 0", patient=True)
    refs = supply.deal(0, keys(run))  # trained, in a checkpoint, and killed before either was recorded
    run.reader = QueueReader(refs, closed=False)
    again = run.supply(20.0)
    again.want(iter(()))  # as the copying of held-out samples does, which comes first
    again.rewind(1)
    assert {key for key, _ in reader(run).acked} == set(keys(run))
    assert all(ref.sample_id not in run.store.samples for ref in refs)


def test_a_resumed_session_reads_what_came_meanwhile_before_it_asks(tmp_path: Path) -> None:
    """Capture went on while training was down: its refs lie in the channel, and no ledger has seen them."""
    first = online(tmp_path, free="checkpoint")
    begin(first)
    second = online(tmp_path, free="checkpoint", store=first.store, reader=first.reader)
    supply = begin(second)
    assert captured(second) == []
    for window in range(2):
        refs = train(supply, second, window)
        assert {ref.generation for ref in refs} == {1}


def test_features_that_are_gone_before_there_is_room_to_ask_for_them(tmp_path: Path) -> None:
    """Kept from a session with higher watermarks, and taken into a window ahead of what this one asked for."""
    run = online(tmp_path)
    supply = begin(run)
    supply.collect(keys(run, 1), what="window 1", patient=True)
    again = online(tmp_path, store=run.store, watermarks=Watermarks(high_watermark_refs=5, low_watermark_refs=4))
    supply = begin(again)
    supply.collect(keys(again, 1), what="window 1", patient=True)
    refs = supply.deal(1, keys(again, 1))
    run.store.delete(refs[0])
    supply.lost(refs[:1], intact=refs[1:])
    train(supply, again, 0)
    assert [ref.generation for ref in train(supply, again, 1)] == [2, 1, 1, 1]


def test_a_resumed_session_captures_again_what_was_trained_after_the_checkpoint_and_freed(tmp_path: Path) -> None:
    first = online(tmp_path)
    supply = begin(first)
    for window in range(2):
        train(supply, first, window)
    second = online(tmp_path, store=first.store)
    supply = begin(second, step=1)
    assert captured(second) == [key for key in keys(first, 0) + keys(first, 1) if key in keys(first, 1)]
    refs = train(supply, second, 1)
    assert {ref.generation for ref in refs} == {2}
    assert second.store.usage().samples == 0


def test_a_resumed_session_with_a_store_that_forgot_everything(tmp_path: Path) -> None:
    """As a colocated run's does: generations begin at 1 again, and that is no reason to refuse them."""
    first = online(tmp_path)
    supply = begin(first)
    for window in range(2):
        train(supply, first, window)
    second = online(tmp_path, store=DictStore())
    supply = begin(second, step=1)
    assert {ref.generation for ref in train(supply, second, 1)} == {1}
    assert second.store.usage().samples == 0


def test_skipped_samples_are_counted_and_nothing_of_them_is_deleted(tmp_path: Path) -> None:
    class Strict(DictStore):
        def delete(self, ref: SampleRef) -> None:
            assert not ref.skipped
            super().delete(ref)

    run = online(tmp_path, store=Strict())
    run.desk = InstantDesk(run, skipping=[keys(run)[0].removesuffix(".e0")])
    supply = begin(run)
    refs = train(supply, run, 0)
    assert refs[0] == skipped_ref(keys(run)[0], prompt_id=refs[0].prompt_id, epoch=0)
    assert supply.skipped == 1
    train(supply, run, 1)
    assert run.store.usage().samples == 0


def test_a_channel_that_cannot_be_told_does_not_hide_why_training_failed(tmp_path: Path) -> None:
    """The disk that is full for the ledger is full for the channel's files too."""

    class Full(QueueReader):
        def fail(self, reason: str) -> None:
            raise ChannelError("cannot be appended to: no space left")

    run = online(tmp_path, reader=Full(closed=False))
    begin(run).fail("the ledger cannot be written")


def test_failing_is_told_to_capture_only_online(tmp_path: Path) -> None:
    run = online(tmp_path / "online")
    run.supply().fail("loss is NaN")
    assert reader(run).failure == "loss is NaN"
    offline = ToyRun(directory=tmp_path / "offline")
    offline.supply().fail("loss is NaN")
    assert reader(offline).failure is None, "a sealed channel is read by other runs too"
