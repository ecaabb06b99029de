# SPDX-License-Identifier: Apache-2.0
"""Order, windows and the loader: what comes when, how it is cut, and that no wait is endless."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import (
    CaptureBatch,
    ChannelFailed,
    DataError,
    DeadlineExceeded,
    FeatureCorrupt,
    FeatureGone,
    PartContext,
    RunStopped,
    Sample,
    SampleRef,
    SilentProgress,
    StaleRef,
    StoreError,
    sample_id,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileChannelConfig, FileStoreConfig
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.demand import PlannedBatch
from specforge_core.loading.held_out import HeldOutCopy
from specforge_core.loading.order import PromptOrder, sample_seed
from specforge_core.loading.planned import cut_batches
from specforge_core.loading.windows import WindowPlan, deal, split
from toy_capture import InstantDesk
from toy_run import DictStore, Prompts, QueueReader, ToyRun, make_sample

PINNED_ORDER = [9, 8, 7, 6, 0, 2, 5, 1, 4, 3]
PINNED_SEED = 6353426928886078380


def _ref(index: int, tokens: int) -> SampleRef:
    return SampleRef(f"p{index}.e0", 1, "dict", (), tokens, f"p{index}", 0)


def _prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_order_and_seeds_are_pinned() -> None:
    """These numbers are in nobody's hands but ours: a change breaks resuming every run there is."""
    order = PromptOrder(10, seed=3, shuffle=True)
    assert order.epoch(0) == PromptOrder(10, seed=3, shuffle=True).epoch(0) == PINNED_ORDER
    assert sorted(order.epoch(1)) == list(range(10)) != order.epoch(1) != order.epoch(0)
    assert list(PromptOrder(4, seed=3, shuffle=False).epoch(5)) == [0, 1, 2, 3]
    assert sample_seed(3, 1, "a") == PINNED_SEED
    assert len({sample_seed(s, e, p) for s in (0, 1) for e in (0, 1) for p in "ab"}) == 8


def test_a_large_order_is_quick() -> None:
    began = time.perf_counter()
    digest = hashlib.sha256(repr(PromptOrder(200_000, seed=0, shuffle=True).epoch(0)).encode()).hexdigest()
    assert len(digest) == 64
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("prompts", "batch", "epochs", "max_steps", "total"),
    [(14, 4, 3, None, 12), (12, 4, 1, None, 3), (14, 4, 3, 5, 5), (1, 8, 2, None, 2), (14, 4, 1, 99, 4)],
)
def test_how_many_windows_a_run_has(prompts: int, batch: int, epochs: int, max_steps: int | None, total: int) -> None:
    plan = WindowPlan(
        num_prompts=prompts, global_batch_size=batch, micro_batch_size=2, epochs=epochs, max_steps=max_steps
    )
    assert plan.total_windows == total


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_dealing_gives_every_sample_to_one_rank(world_size: int) -> None:
    refs = [_ref(i, 1 + (i * 37) % 50) for i in range(13)]
    shares = deal(refs, world_size)
    assert sorted(ref.sample_id for share in shares for ref in share) == sorted(ref.sample_id for ref in refs)
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert deal(refs, world_size) == shares


def test_dealing_balances_tokens() -> None:
    refs = [_ref(i, tokens) for i, tokens in enumerate([100, 1, 1, 100, 50, 50, 1, 1])]
    assert [sum(ref.num_tokens for ref in share) for share in deal(refs, 2)] == [152, 152]


@pytest.mark.parametrize(("count", "parts", "sizes"), [(5, 2, [2, 3]), (4, 2, [2, 2]), (1, 3, [1]), (0, 2, [])])
def test_micro_batches_are_never_empty(count: int, parts: int, sizes: list[int]) -> None:
    assert [len(part) for part in split([_ref(i, 1) for i in range(count)], parts)] == sizes


def test_all_ranks_make_the_same_number_of_passes() -> None:
    refs = [_ref(i, 5 + i) for i in range(11)]
    for world_size in (1, 2, 3, 4):
        passes = {
            len(
                WindowPlan(
                    num_prompts=11,
                    global_batch_size=11,
                    micro_batch_size=2,
                    epochs=1,
                    rank=rank,
                    world_size=world_size,
                ).cut(refs)
            )
            for rank in range(world_size)
        }
        assert len(passes) == 1


def test_windows_follow_prompt_order_and_keep_the_short_last_one(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, epochs=2, micro_batch_size=2)
    windows = list(run.loader().windows())
    order = PromptOrder(14, seed=7, shuffle=True)
    for epoch in range(2):
        ids = [ref.prompt_id for window in windows if window.epoch == epoch for ref in window.refs]
        assert ids == [f"p{i}" for i in order.epoch(epoch)]
    assert [len(window.refs) for window in windows] == [4, 4, 4, 2] * 2
    assert [len(window.micro_batches) for window in windows] == [2, 2, 2, 1] * 2
    assert all(sum(batch.num_tokens for batch in w.micro_batches) == w.num_tokens for w in windows)
    assert not _prefetch_threads()


def test_starting_later_gives_the_same_windows(tmp_path: Path) -> None:
    whole = list(ToyRun(directory=tmp_path).loader().windows())
    later = list(ToyRun(directory=tmp_path).loader().windows(5))
    assert [window.index for window in later] == list(range(5, 12))
    for a, b in zip(whole[5:], later, strict=True):
        for one, two in zip(a.micro_batches, b.micro_batches, strict=True):
            assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_offline_features_are_drawn_anew_each_epoch(tmp_path: Path) -> None:
    """The features are reused; what is random about a sample follows the training epoch."""
    run = ToyRun(directory=tmp_path, prompts=4, epochs=2)
    first, second = run.loader().windows()
    anchors = [sorted(map(tuple, w.micro_batches[0].tensors["anchors"].tolist())) for w in (first, second)]
    assert anchors[0] != anchors[1]


def test_refs_may_come_in_any_order_and_from_another_thread(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, reuse_features=False, epochs=1)
    refs = run.publish_all()
    run.reader = QueueReader(closed=False)

    def publish() -> None:
        for ref in reversed(refs):
            time.sleep(0.005)
            assert isinstance(run.reader, QueueReader)
            run.reader.publish([ref])

    thread = threading.Thread(target=publish)
    thread.start()
    windows = list(run.loader().windows())
    thread.join()
    assert [ref.sample_id for window in windows for ref in window.refs] == [ref.sample_id for ref in refs]
    assert windows[0].waited_seconds > 0


def test_a_missing_sample_is_named_at_the_deadline(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, reuse_features=False)
    refs = run.publish_all()
    run.reader = QueueReader(refs[:6], closed=False)
    windows = run.loader(deadline_seconds=0.3).windows()
    assert next(windows).index == 0
    with pytest.raises(DeadlineExceeded, match=rf"{refs[6].sample_id}: not captured .*2 of 4 of window 1, 6 refs"):
        next(windows)
    assert not _prefetch_threads()


def test_a_sample_that_will_never_come_is_named_at_once(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path)
    refs = run.publish_all()
    run.reader = QueueReader([ref for ref in refs if ref.prompt_id != "p9"])
    began = time.monotonic()
    with pytest.raises(DataError, match=r"sample p9\.e0.*never come"):
        list(run.loader(deadline_seconds=60).windows())
    assert time.monotonic() - began < 5


def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path)
    run.reader = QueueReader(closed=False)
    timer = threading.Timer(0.2, lambda: run.stop.request("test"))
    timer.start()
    with pytest.raises(RunStopped):
        list(run.loader(deadline_seconds=60).windows())
    timer.join()
    assert not _prefetch_threads()


def test_a_stop_that_capture_reports_first_is_still_a_stop(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path)

    class Stopping(QueueReader):
        def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
            run.stop.request("interrupted")
            raise ChannelFailed("stopped")

    run.reader = Stopping(closed=False)
    with pytest.raises(RunStopped, match="interrupted"):
        list(run.loader().windows())


class BrokenStore(DictStore):
    """Reads one sample wrongly, or never."""

    def __init__(self, broken: str, *, hang: bool = False) -> None:
        super().__init__()
        self._broken = broken
        self._hang = hang

    def get(self, ref: SampleRef) -> Sample:
        if ref.prompt_id == self._broken and self._hang:
            time.sleep(1.0)
        if ref.prompt_id == self._broken:
            raise FeatureCorrupt("17 bytes too few")
        return super().get(ref)


def test_an_error_in_the_prefetch_thread_surfaces_and_names_the_sample(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, store=BrokenStore("p3"))
    with pytest.raises(FeatureCorrupt, match=r"sample p3\.e0: 17 bytes too few"):
        list(run.loader().windows())
    assert not _prefetch_threads()


def test_a_store_that_does_not_answer_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, store=BrokenStore("p3", hang=True))
    with pytest.raises(DeadlineExceeded, match="reading a window's features took longer"):
        list(run.loader(deadline_seconds=0.2).windows())


def test_prefetching_is_bounded(tmp_path: Path) -> None:
    class Counting(DictStore):
        reads = 0

        def get(self, ref: SampleRef) -> Sample:
            self.reads += 1
            return super().get(ref)

    store = Counting()
    windows = ToyRun(directory=tmp_path, store=store).loader().windows()
    next(windows)
    time.sleep(0.3)
    assert store.reads == 4 * 3, "prefetch_windows = 2: the one in hand and two ahead"
    next(windows)
    windows.close()
    assert not _prefetch_threads()


def test_a_second_capture_of_a_sample_replaces_the_first(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, prompts=2, epochs=1)
    old, new = ([run.store.put(sample_id(f"p{i}", 0), make_sample(i)) for i in range(2)] for _ in range(2))
    run.reader = QueueReader([*new, *old])
    (window,) = run.loader().windows()
    assert {ref.generation for ref in window.refs} == {2}


def test_held_out_batches_are_the_same_each_time(tmp_path: Path) -> None:
    held_out = ToyRun(directory=tmp_path).held_out()
    first, second = list(held_out), list(held_out)
    assert [batch.num_samples for batch in first] == [1, 2, 2]
    _assert_equal(first, second)


def _assert_equal(first: Sequence[object], second: Sequence[object]) -> None:
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)  # type: ignore[attr-defined]


# --- features that are gone, and samples that were skipped -----------------------------------------------------------


class LosingStore(DictStore):
    """Fails to read each of some prompts' features so many times, with each error in turn."""

    def __init__(self, prompts: Sequence[str], errors: Sequence[type[StoreError]]) -> None:
        super().__init__()
        self._errors = {prompt: list(errors) for prompt in prompts}

    def get(self, ref: SampleRef) -> Sample:
        if errors := self._errors.get(ref.prompt_id):
            raise errors.pop(0)("it was here a moment ago")
        return super().get(ref)


def _online(directory: Path, store: DictStore, **settings: object) -> ToyRun:
    run = ToyRun(directory=directory, store=store, epochs=1, reuse_features=False, free="window", **settings)
    run.desk = InstantDesk(run)
    return run


@pytest.mark.parametrize("error", [FeatureGone, StaleRef, FeatureCorrupt])
def test_features_that_are_gone_are_captured_again(tmp_path: Path, error: type[StoreError]) -> None:
    whole = list(ToyRun(directory=tmp_path / "whole", epochs=1).loader().windows())
    run = _online(tmp_path / "losing", LosingStore(["p3", "p8"], [error]))
    windows = list(run.loader().windows())
    assert isinstance(run.desk, InstantDesk)
    assert sorted(run.desk.captured[14:]) == ["p3.e0", "p8.e0"], "these two, and nothing else"
    for found, expected in zip(windows, whole, strict=True):
        assert [ref.sample_id for ref in found.refs] == [ref.sample_id for ref in expected.refs]
        _assert_equal(found.micro_batches, expected.micro_batches)
    assert not _prefetch_threads()


def test_features_that_vanish_each_time_are_named_in_the_end(tmp_path: Path) -> None:
    run = _online(tmp_path, LosingStore(["p3"], [FeatureGone] * 99))
    with pytest.raises((FeatureGone, DataError), match=r"sample p3\.e0"):
        list(run.loader().windows())
    assert isinstance(run.desk, InstantDesk)
    assert run.desk.captured.count("p3.e0") <= 7
    assert not _prefetch_threads()


def test_offline_features_that_are_gone_are_an_error_at_once(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, store=LosingStore(["p3"], [FeatureGone]))
    with pytest.raises(FeatureGone, match=r"sample p3\.e0: it was here a moment ago"):
        list(run.loader().windows())


@pytest.mark.parametrize("failures", [1, 3])
def test_a_store_that_does_not_answer_is_asked_again(
    tmp_path: Path, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specforge_core.loading.loader._RETRY_SECONDS", (0.01, 0.02, 0.03))
    run = _online(tmp_path, LosingStore(["p3"], [StoreError] * failures))
    assert len(list(run.loader().windows())) == 4
    assert isinstance(run.desk, InstantDesk)
    assert len(run.desk.captured) == 14, "nothing was captured again"


def test_a_store_that_never_answers_is_given_up_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_core.loading.loader._RETRY_SECONDS", (0.01, 0.02, 0.03))
    run = _online(tmp_path, LosingStore(["p3"], [StoreError] * 4))
    with pytest.raises(StoreError, match=r"sample p3\.e0: it was here"):
        list(run.loader().windows())
    assert not _prefetch_threads()


def test_a_store_that_does_not_answer_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    run = _online(tmp_path, LosingStore(["p3"], [StoreError] * 99))
    timer = threading.Timer(0.3, run.stop.request, ["Ctrl-C"])
    timer.start()
    began = time.monotonic()
    with pytest.raises(RunStopped):
        list(run.loader().windows())
    assert time.monotonic() - began < 3
    assert not _prefetch_threads()


def test_a_skipped_sample_is_a_member_that_weighs_nothing(tmp_path: Path) -> None:
    run = _online(tmp_path, DictStore(), micro_batch_size=2)
    order = run.order.epoch(0)
    skipped = [f"p{order[1]}", *(f"p{index}" for index in order[4:8])]
    run.desk = InstantDesk(run, skipping=skipped)
    windows = list(run.loader().windows())
    assert [len(window.refs) for window in windows] == [4, 4, 4, 2]
    assert [len(window.micro_batches) for window in windows] == [2, 0, 2, 1]
    assert [sum(batch.num_samples for batch in window.micro_batches) for window in windows] == [3, 0, 4, 2]
    assert [ref.prompt_id for window in windows for ref in window.refs if ref.skipped] == skipped
    assert windows[1].num_tokens == 0


# --- held-out features of online runs --------------------------------------------------------------------------------

HELD_OUT = [f"p{index}" for index in range(100, 107)]


class HeldOutDesk(InstantDesk):
    """Captures held-out prompts."""

    def _capture(self, batch: CaptureBatch, offset: int) -> SampleRef:
        index = 100 + batch.first + offset
        self.captured.append(f"p{index}.held-out")
        return self._run.store.put(f"p{index}.held-out", self._run.make_sample(index, 0))


class Stopping(SilentProgress):
    """Ends the session once so many samples were copied."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, units: int, **values: float) -> None:
        self._left -= units
        if self._left == 0:
            raise RunStopped("Ctrl-C")


def _held_out_batches() -> Iterator[PlannedBatch]:
    def describe(index: int) -> tuple[str, int]:
        return f"{HELD_OUT[index]}.held-out", 100

    return cut_batches(range(7), describe, batch=("eval", 0, "f"), size=3, places=range(7))


def _copy(directory: Path, store: DictStore, *, stop_after: int = 0) -> tuple[ToyRun, FileChannel]:
    """A session that copies held-out samples into files; ``stop_after``: is stopped when so many are copied."""
    run = _online(directory, store, watermarks=Watermarks(high_watermark_refs=4, low_watermark_refs=2))
    run.desk = HeldOutDesk(run)
    context = PartContext(run_id="toy", directory=directory / "eval")
    channel = FileChannel(FileChannelConfig(name="file"), context)
    copy = HeldOutCopy(
        supply=run.supply(),
        source=run.samples(store),
        kept=FileStore(FileStoreConfig(name="file"), context),
        writer=channel.writer("held-out"),
        sign=lambda ref: ref,
        progress=Stopping(stop_after),
    )
    if stop_after:
        with pytest.raises(RunStopped):
            copy.collect(Prompts(7, first=100), [f"{prompt}.held-out" for prompt in HELD_OUT], _held_out_batches())
    else:
        copy.collect(Prompts(7, first=100), [f"{prompt}.held-out" for prompt in HELD_OUT], _held_out_batches())
    return run, channel


def _kept(directory: Path, channel: FileChannel) -> list[Sample]:
    store = FileStore(FileStoreConfig(name="file"), PartContext(run_id="toy", directory=directory / "eval"))
    refs = channel.reader().poll(100, 0.0)
    return [store.get(ref) for ref in refs]


def test_held_out_samples_are_captured_once_and_kept(tmp_path: Path) -> None:
    store = DictStore()
    run, channel = _copy(tmp_path, store)
    assert isinstance(run.desk, HeldOutDesk)
    assert sorted(run.desk.captured) == sorted(f"{prompt}.held-out" for prompt in HELD_OUT)
    assert store.usage().samples == 0, "freed in the run's own store as soon as they are copied"
    kept = _kept(tmp_path, channel)
    assert [sample.prompt_id for sample in kept] == HELD_OUT
    for sample in kept:
        expected = make_sample(int(sample.prompt_id[1:]))
        assert all(torch.equal(sample.features[name], expected.features[name]) for name in expected.features)
    again, _ = _copy(tmp_path, store)
    assert isinstance(again.desk, HeldOutDesk)
    assert again.desk.captured == []


@pytest.mark.parametrize("same_store", [True, False], ids=["the store stays", "the store forgets"])
@pytest.mark.parametrize("copied", [1, 3, 4, 6])
def test_copying_held_out_samples_goes_on_where_it_was_stopped(tmp_path: Path, copied: int, same_store: bool) -> None:
    store = DictStore()
    _copy(tmp_path, store, stop_after=copied)
    second, channel = _copy(tmp_path, store if same_store else DictStore())
    assert [sample.prompt_id for sample in _kept(tmp_path, channel)] == HELD_OUT
    assert isinstance(second.desk, HeldOutDesk)
    assert len(second.desk.captured) <= 7 - copied
    assert second.store.usage().samples == 0


@pytest.mark.parametrize("same_store", [True, False], ids=["the store stays", "the store forgets"])
def test_killed_between_taking_a_held_out_sample_and_keeping_it(tmp_path: Path, same_store: bool) -> None:
    first = _online(tmp_path, DictStore())
    first.desk = HeldOutDesk(first)
    supply = first.supply()
    supply.want(_held_out_batches())
    key = f"{HELD_OUT[0]}.held-out"
    supply.collect([key], what="the held-out samples", patient=True)
    supply.deal(-1, [key])
    second, channel = _copy(tmp_path, first.store if same_store else DictStore())  # type: ignore[arg-type]
    assert [sample.prompt_id for sample in _kept(tmp_path, channel)] == HELD_OUT
    assert second.store.usage().samples == 0


@pytest.mark.parametrize("error", [FeatureGone, FeatureCorrupt])
def test_held_out_samples_that_vanish_are_captured_again(tmp_path: Path, error: type[StoreError]) -> None:
    run, channel = _copy(tmp_path, LosingStore(["p102"], [error]))
    assert len(_kept(tmp_path, channel)) == 7
    assert isinstance(run.desk, HeldOutDesk)
    assert run.desk.captured.count("p102.held-out") == 2
