# SPDX-License-Identifier: Apache-2.0
"""Whole runs over the toy strategy: cutting, resuming, stopping, failing."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import (
    Batch,
    CheckpointError,
    DataError,
    Ratio,
    SpecForgeError,
    StepContext,
    StepOutput,
    StopSignal,
)
from specforge_core.features.ledger import Ledger
from specforge_core.loading.supply import Free
from specforge_core.training.evaluator import Evaluation
from specforge_core.training.window_step import WindowResult
from toy_capture import InstantDesk
from toy_run import DictStore, QueueReader, ToyRun, largest_difference, same_bits
from toy_strategy import MeasuringToyStrategy, ToyStrategy
from training_recorder import Recorder


@pytest.mark.parametrize("strategy", [ToyStrategy(), MeasuringToyStrategy()], ids=["plain", "measuring"])
def test_cutting_a_window_does_not_change_the_step(tmp_path: Path, strategy: ToyStrategy) -> None:
    weights = {
        size: ToyRun(directory=tmp_path / str(size), micro_batch_size=size, strategy=strategy).weights()
        for size in (4, 2, 1)
    }
    assert largest_difference(weights[4], weights[2]) < 1e-6
    assert largest_difference(weights[4], weights[1]) < 1e-6


def test_the_measured_sum_matters(tmp_path: Path) -> None:
    plain = ToyRun(directory=tmp_path / "plain").weights()
    measuring = ToyRun(directory=tmp_path / "measuring", strategy=MeasuringToyStrategy()).weights()
    assert largest_difference(plain, measuring) > 1e-4


def test_sorting_by_length_does_not_change_the_result(tmp_path: Path) -> None:
    a = ToyRun(directory=tmp_path / "a", micro_batch_size=2, sort_by_length=True).weights()
    b = ToyRun(directory=tmp_path / "b", micro_batch_size=2, sort_by_length=False).weights()
    assert largest_difference(a, b) < 1e-6


def test_the_same_run_gives_the_same_bits_offline_and_online(tmp_path: Path) -> None:
    a = ToyRun(directory=tmp_path / "a").weights()
    b = ToyRun(directory=tmp_path / "b").weights()
    online = ToyRun(directory=tmp_path / "c", reuse_features=False, free="window")
    assert same_bits(a, b)
    assert same_bits(a, online.weights())
    assert online.store.samples == {}
    assert isinstance(online.reader, QueueReader)
    assert len(online.reader.acked) == 3 * 14


@pytest.mark.parametrize("after", [1, 3, 4, 7])
def test_a_stopped_run_resumes_with_the_same_bits(tmp_path: Path, after: int) -> None:
    uninterrupted = ToyRun(directory=tmp_path / "whole").weights()
    stop = StopSignal()
    recorder = Recorder(stop, after)
    run = ToyRun(directory=tmp_path / "cut", stop=stop, observers=(recorder,))
    assert run.trainer().fit() == "stopped"
    assert recorder.results[-1].step == after
    assert recorder.events[-2:] == [f"saved {after}", "stopped"]
    second = Recorder()
    resumed = ToyRun(directory=tmp_path / "cut", observers=(second,)).weights()
    assert second.events[0] == f"started {after}/12"
    assert same_bits(uninterrupted, resumed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    ToyRun(directory=tmp_path).weights()
    recorder = Recorder()
    ToyRun(directory=tmp_path, observers=(recorder,)).weights()
    assert recorder.events == ["started 12/12", "finished"]


def test_resuming_another_run_is_refused(tmp_path: Path) -> None:
    ToyRun(directory=tmp_path, epochs=1).weights()
    with pytest.raises(CheckpointError, match=r"config\.training\.epochs: the checkpoint has 1, this run has 2"):
        ToyRun(directory=tmp_path, epochs=2).trainer().fit()


def test_bf16_with_masters_follows_fp32(tmp_path: Path) -> None:
    fp32, bf16 = Recorder(), Recorder()
    full = ToyRun(directory=tmp_path / "a", observers=(fp32,), learning_rate=0.02).weights()
    half = ToyRun(directory=tmp_path / "b", observers=(bf16,), learning_rate=0.02, dtype=torch.bfloat16).weights()
    assert all(half[name].dtype == full[name].dtype for name in full), "masters and moments are fp32"
    for a, b in zip(fp32.results, bf16.results, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=0.02)


def test_a_stopped_bf16_run_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = ToyRun(directory=tmp_path / "whole", dtype=torch.bfloat16).weights()
    stop = StopSignal()
    ToyRun(directory=tmp_path / "cut", dtype=torch.bfloat16, stop=stop, observers=(Recorder(stop, 5),)).weights()
    assert same_bits(whole, ToyRun(directory=tmp_path / "cut", dtype=torch.bfloat16).weights())


def test_features_are_freed_when_a_checkpoint_covers_them(tmp_path: Path) -> None:
    stop = StopSignal()
    run = ToyRun(directory=tmp_path, reuse_features=False, free="checkpoint", stop=stop)
    held: list[int] = []

    class Watcher(Recorder):
        def window_trained(self, result: WindowResult) -> None:
            held.append(len(run.store.samples))

    run.observers = (Watcher(),)
    run.weights()
    assert held[:4] == [42, 42, 42, 42 - 12], "three windows of four leave with the checkpoint after the third"


class ExplodingStrategy(ToyStrategy):
    def loss(self, draft: torch.nn.Module, batch: Batch, ctx: StepContext) -> StepOutput:
        output = super().loss(draft, batch, ctx)
        if ctx.step == 4:
            output.terms[0].numerator.data.fill_(float("nan"))  # type: ignore[index]
        return output


def test_a_loss_that_is_not_finite_fails_before_the_update(tmp_path: Path) -> None:
    recorder = Recorder()
    run = ToyRun(directory=tmp_path, strategy=ExplodingStrategy(), observers=(recorder,), reuse_features=False)
    trainer = run.trainer()
    with pytest.raises(SpecForgeError, match=r"samples p\d+\.e1.*not finite in optimizer step 5"):
        trainer.fit()
    assert recorder.events[-2:] == ["saved 4", "failed"]
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.step.optimizer.state().values())
    assert isinstance(run.reader, QueueReader)
    assert "not finite" in (run.reader.failure or "")
    whole = ToyRun(directory=tmp_path / "whole").weights()
    assert same_bits(whole, ToyRun(directory=tmp_path).weights()), "it goes on from step 4"


def test_a_failing_store_names_the_sample_and_leaves_no_thread(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path)
    trainer = run.trainer()
    del run.store.samples["p3.e0"]
    with pytest.raises(SpecForgeError, match=r"sample p3\.e0"):
        trainer.fit()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_sample_that_was_never_captured_fails_and_keeps_what_was_trained(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path, store=DictStore())
    refs = run.publish_all()
    run.reader = QueueReader(refs[:-1])
    with pytest.raises(DataError, match=refs[-1].sample_id):
        run.trainer().fit()
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000003"


def test_evaluation_sums_counts_before_any_ratio(tmp_path: Path) -> None:
    recorder = Recorder()
    run = ToyRun(directory=tmp_path, observers=(recorder,))
    trainer = run.trainer()
    trainer.fit()
    assert [event for event in recorder.events if event.startswith("evaluated")] == [
        "evaluated 3",
        "evaluated 6",
        "evaluated 9",
        "evaluated 12",
    ]
    parts = trainer._parts
    held_out = run.held_out()
    in_one = parts.evaluator.run(trainer.step.draft, type(held_out)(**_fields(held_out, micro_batch_size=99)), step=12)
    last = recorder.evaluations[-1]
    assert list(in_one.position_accuracy) == list(last.position_accuracy)
    assert in_one.loss == pytest.approx(last.loss, rel=1e-5)
    assert in_one.metrics["anchor_share"] == last.metrics["anchor_share"]


def _fields(record: object, **changes: object) -> dict[str, object]:
    from dataclasses import fields

    return {item.name: getattr(record, item.name) for item in fields(record)} | changes  # type: ignore[arg-type]


def test_an_empty_evaluation_has_no_metric(tmp_path: Path) -> None:
    run = ToyRun(directory=tmp_path)
    trainer = run.trainer()
    evaluation = trainer._parts.evaluator.run(trainer.step.draft, [], step=0)
    assert evaluation.values() == {}
    assert Evaluation(loss=None, position_accuracy=[Ratio(0, 0)], metrics={}).values() == {}


def _capturing(directory: Path, *, skipping: Sequence[str] = (), **settings: object) -> ToyRun:
    run = ToyRun(directory=directory, reuse_features=False, free="window", **settings)
    run.desk = InstantDesk(run, skipping=skipping)
    return run


@pytest.mark.parametrize("strategy", [ToyStrategy(), MeasuringToyStrategy()], ids=["plain", "measuring"])
def test_a_skipped_sample_weighs_nothing(tmp_path: Path, strategy: ToyStrategy) -> None:
    """As if its prompt trained no token: p4 and p9 train none anyway."""
    with_them = ToyRun(directory=tmp_path / "a", strategy=strategy).weights()
    without = _capturing(tmp_path / "b", skipping=["p4", "p9"], strategy=strategy)
    assert largest_difference(with_them, without.weights()) < 1e-6


def test_a_window_of_skipped_samples_alone_is_a_step_all_the_same(tmp_path: Path) -> None:
    recorder = Recorder()
    run = _capturing(tmp_path, observers=(recorder,), epochs=2)
    skipping = [f"p{index}" for index in run.order.epoch(0)[4:8]]
    run.desk = InstantDesk(run, skipping=skipping)
    run.weights()
    assert [result.step for result in recorder.results] == list(range(1, 9))
    empty = recorder.results[1]
    assert (empty.num_tokens, empty.grad_norm, empty.metrics, list(empty.position_accuracy)) == (0, 0.0, {}, [])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "simulated_acceptance_length" not in lines[1]
    assert "accuracy_0" not in lines[1]
    assert "loss" not in lines[1], "nothing was counted, so there is no loss; least of all a perfect one"
    assert recorder.events[-1] == "finished"


def test_a_run_of_skipped_samples_alone_ends(tmp_path: Path) -> None:
    run = _capturing(tmp_path, skipping=[f"p{index}" for index in range(14)], epochs=1)
    run.weights()
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step-00000004"


@pytest.mark.parametrize("free", ["window", "checkpoint"])
@pytest.mark.parametrize("after", [1, 3, 4, 7])
def test_an_online_run_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Path, after: int, free: Free) -> None:
    """The store outlives the session: what is still there is used, the rest is captured again."""
    whole = ToyRun(directory=tmp_path / "whole").weights()
    stop = StopSignal()
    first = _capturing(tmp_path / "cut", stop=stop, observers=(Recorder(stop, after),))
    first.free = free
    assert first.trainer().fit() == "stopped"
    second = _capturing(tmp_path / "cut", store=first.store)
    second.free = free
    assert same_bits(whole, second.weights())
    assert first.store.usage().samples == 0
    assert isinstance(first.desk, InstantDesk)
    assert isinstance(second.desk, InstantDesk)
    captured = first.desk.captured + second.desk.captured
    assert len(captured) == len(set(captured)) == 3 * 14, "a clean stop loses nothing"
    deals = list(Ledger(tmp_path / "cut" / "ledger.sqlite", run_id="toy").deals())
    assert len(deals) == len({sample for _, sample, _, _ in deals}) == 3 * 14
    assert all(trained for *_, trained in deals)


class Killed(Exception):
    """What a SIGKILL would leave: nothing after it runs in this session."""


class Killing(Recorder):
    """Kills the run after a step, before that window is acknowledged."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._kill_after = after

    def window_trained(self, result: WindowResult) -> None:
        if result.step == self._kill_after:
            raise Killed


@pytest.mark.parametrize("wires", ["store stays", "store forgets"])
@pytest.mark.parametrize("free", ["window", "checkpoint"])
@pytest.mark.parametrize("after", [2, 3, 5, 8, 12])
def test_an_online_run_killed_between_checkpoints_ends_with_the_same_bits(
    tmp_path: Path, after: int, free: Free, wires: str
) -> None:
    whole = ToyRun(directory=tmp_path / "whole").weights()
    first = _capturing(tmp_path / "cut", observers=(Killing(after),))
    first.free = free
    with pytest.raises(Killed):
        first.trainer().fit()
    second = _capturing(tmp_path / "cut", **({"store": first.store} if wires == "store stays" else {}))
    second.free = free
    assert same_bits(whole, second.weights())
    assert second.store.usage().samples == 0
    deals = list(Ledger(tmp_path / "cut" / "ledger.sqlite", run_id="toy").deals())
    assert len(deals) == len({sample for _, sample, _, _ in deals}) == 3 * 14, "nothing lost, nothing twice"
