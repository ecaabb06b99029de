# SPDX-License-Identifier: Apache-2.0
"""Who drives what: the capture role, the train role, and both together.

The halves are the same in every topology. What differs is where they run, and that is decided here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from specforge_core.capture.loop import CaptureCounts, CaptureLoop
from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    ConfigError,
    LeaseDesk,
    RefWriter,
    RunMismatch,
    RunStopped,
    Split,
)
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.demand import Demand
from specforge_core.run.assemble import Run
from specforge_core.run.feature_manifest import check_features, record_features
from specforge_core.run.machine import check_device
from specforge_core.run.watchdog import ending_when_stuck
from specforge_core.run.wires import process_name
from specforge_core.training.observers import Outcome

_FINISHED = "training has finished"
_NO_LIMIT = Watermarks(high_watermark_refs=sys.maxsize, low_watermark_refs=1)


def capture(run: Run) -> list[CaptureCounts]:
    """The capture role: works off what is wanted, beside any number of other capture processes.

    Offline it wants every prompt itself, held-out ones first; online it waits for the train role. Returns what this
    process did, by split.

    :raises SpecForgeError: what went wrong; the train role, where it runs, is told the reason.
    """
    _refuse_half(run)
    if run.plan.feature_reuse:
        return [_capture_once(run, split) for split in _splits(run)]
    return [_capture_what_is_wanted(run)]


def train(run: Run) -> Outcome:
    """The train role, from the latest checkpoint to the end; returns ``finished`` or ``stopped``."""
    _refuse_half(run)
    return _train(run)


def capture_and_train(run: Run) -> Outcome:
    """Both halves in this process: one after the other where features are captured once, else side by side."""
    check_device(run.plan.config.training.device)  # before hours of capture
    with run.directory.lock("run"):
        if not run.plan.feature_reuse:
            return _side_by_side(run)
        capture(run)
        return train(run)


def _train(run: Run) -> Outcome:
    check_device(run.plan.config.training.device)
    if run.parallelism.world_size > 1 and not run.plan.feature_reuse:
        raise ConfigError(
            f"a {run.plan.config.topology} run has one reader, so one rank can train it",
            where="topology",
            hint="train with several ranks from offline features (topology: offline)",
        )
    with run.directory.lock("train") if run.parallelism.rank == 0 else nullcontext():
        if run.plan.feature_reuse:
            check_features(run.directory.split("train"), run.manifest("train"))
            return run.trainer().fit()
        return _train_online(run)


def _train_online(run: Run) -> Outcome:
    """Train on what is captured meanwhile; capture is told how it ended."""
    end = run.train_end
    _ = end.reader  # where the wires cannot be opened, nobody can be told
    try:
        _withdraw_what_changed(run)
        if run.plan.config.data.eval:
            run.copy_held_out()
        trainer = run.trainer()
    except RunStopped:
        end.desk.end(f"training was stopped: {run.stop.reason}")
        return "stopped"
    except BaseException as error:
        end.supply.fail(str(error) or type(error).__name__)
        raise
    outcome = trainer.fit()
    now = datetime.now(UTC).isoformat(timespec="seconds")  # so that it is unlike an earlier session's end
    end.desk.end(f"{_FINISHED}, {now}" if outcome == "finished" else f"training was stopped: {run.stop.reason}, {now}")
    if outcome == "finished":
        end.supply.discard_rest()
    return outcome


def _withdraw_what_changed(run: Run) -> None:
    """What an earlier attempt wanted with another target, features or prompts, nobody can capture any more."""
    desk, ours = run.train_end.desk, {split: run.batches.fingerprint(split) for split in _splits(run)}
    if any(batch.fingerprint != ours.get(batch.split) for batch in desk.outstanding()):
        desk.end("what is wanted has changed")


def _refuse_half(run: Run) -> None:
    """One half alone, on wires that end with this process, would wait for nobody or capture for nobody."""
    wires = (run.plan.feature_store, run.plan.ref_channel)
    private = [spec.name for spec in wires if not spec.capabilities.cross_process]
    if private:
        raise ConfigError(
            f"one half of a {run.plan.config.topology} run cannot run alone: "
            f"{' and '.join(dict.fromkeys(private))} keeps everything in this process",
            where="topology",
            hint="use `specforge run`, or topology: offline",
        )


def _side_by_side(run: Run) -> Outcome:
    """Capture in a thread, train in this one. The first failure of either stops the other and is the one raised."""
    failures: list[BaseException] = []

    def capture_half() -> None:
        try:
            _capture_what_is_wanted(run)
        except RunStopped:
            pass
        except BaseException as error:  # noqa: BLE001 - a thread boundary: raised again by the thread that trains
            failures.append(error)
            run.stop.request(f"capture failed: {error}")

    # constructed here, before there are two threads that could each construct their own
    _ = run.engine, run.strategy, run.order, run.window_plan
    for split in _splits(run):
        run.prompts(split)
    thread = threading.Thread(target=capture_half, name="capture", daemon=True)
    thread.start()
    try:
        outcome = _train(run)
    except ChannelFailed:
        if failures:
            raise failures[0] from None
        raise
    finally:
        run.stop.request("training has ended")
        thread.join(run.plan.config.loading.deadline_seconds)
    if failures:
        raise failures[0]
    return outcome


def _splits(run: Run) -> tuple[Split, ...]:
    return ("eval", "train") if run.plan.config.data.eval else ("train",)


def _capture_once(run: Run, split: Split) -> CaptureCounts:
    """Capture a split for every epoch to come; goes on where interrupted captures stopped."""
    record_features(run.directory.split(split), run.manifest(split))
    with _capturing(run, split) as half:
        outstanding = half.desk.outstanding()
        published = run.wires.trusted(half.writer.published())
        done = {ref.sample_id for ref in published}
        run.progress("capture").begin(f"capturing {split} prompts", len(run.prompts(split)) - len(done))
        Demand(half.desk, _NO_LIMIT).begin(run.batches.planned_once(split), done, outstanding=outstanding)
        half.loop.run(lambda: bool(half.desk.outstanding()))
        run.wires[split].channel.seal()
    return half.loop.counts


def _capture_what_is_wanted(run: Run) -> CaptureCounts:
    """Capture what the train role of an online run offers, until it wants no more."""
    with _capturing(run, "train") as half:
        stale, until = half.desk.ended, time.monotonic() + run.plan.config.loading.deadline_seconds

        def goes_on() -> bool:
            """Where an earlier session ended, training is yet to come; or not, if it had finished."""
            nonlocal stale
            ended = half.desk.ended
            if ended is None:
                stale = None
            elif ended != stale:
                return False
            return ended is None or not ended.startswith(_FINISHED) or time.monotonic() < until

        run.progress("capture").begin("capturing what training wants", None)
        with _never_stuck(run, half.loop):
            half.loop.run(goes_on)
    return half.loop.counts


def _never_stuck(run: Run, loop: CaptureLoop) -> AbstractContextManager[None]:
    """In a process of its own, capture that stands still ends before training gives up; beside training, training
    does."""
    if not run.plan.ref_channel.capabilities.cross_process:
        return nullcontext()
    limit = run.plan.config.loading.deadline_seconds / 2
    return ending_when_stuck(lambda: loop.stuck_seconds, limit_seconds=limit)


@dataclass(frozen=True, slots=True)
class _CaptureHalf:
    writer: RefWriter
    desk: LeaseDesk
    loop: CaptureLoop


@contextmanager
def _capturing(run: Run, split: Split) -> Iterator[_CaptureHalf]:
    """The capture loop with its end of a channel; the reader is told how it ended."""
    channel, name = run.wires[split].channel, process_name()
    writer = channel.writer(name)
    try:
        desk = channel.leases()
        yield _CaptureHalf(writer, desk, run.capture_loop(split, writer=writer, desk=desk, name=name))
        desk.close()
    except RunStopped:
        raise  # neither closed nor failed: what was published is whole, and others may go on after it
    except RunMismatch:
        writer.close()  # a machine that was set up for something else is no reason to end the run
        raise
    except BaseException as error:
        with suppress(ChannelError):  # what happened first is what is told
            writer.fail(str(error) or type(error).__name__)
        raise
    writer.close()
