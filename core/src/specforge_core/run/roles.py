# SPDX-License-Identifier: Apache-2.0
"""Who drives what: the capture role, the train role, and both together.

The halves are the same in every topology. What differs is where they run, and that is decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from specforge_core.contracts import ChannelFailed, ConfigError, Prompt, RefWriter, RunStopped
from specforge_core.run.assemble import Run
from specforge_core.run.directory import Split
from specforge_core.run.feature_manifest import check_features, record_features
from specforge_core.run.machine import check_device
from specforge_core.run.ordered_prompts import OrderedPrompts
from specforge_core.training.observers import Outcome

WRITER = "capture-0"


@dataclass(frozen=True, slots=True)
class _Pass:
    """One walk through prompts: which, for which epoch, and how many of them are done already."""

    prompts: Sequence[Prompt]
    epoch: int
    start: int = 0


def capture(run: Run) -> None:
    """The capture role: the held-out prompts once, then the training prompts as the topology wants them.

    :raises SpecForgeError: what went wrong; the train role, where it runs, is told the reason.
    """
    _refuse_half(run)
    with run.directory.lock("capture"):
        _capture_once(run, "eval")
        if run.plan.feature_reuse:
            _capture_once(run, "train")
        else:
            _capture_each_epoch(run)


def train(run: Run) -> Outcome:
    """The train role, from the latest checkpoint to the end; returns ``finished`` or ``stopped``."""
    _refuse_half(run)
    return _train(run)


def _train(run: Run) -> Outcome:
    check_device(run.plan.config.training.device)
    if run.parallelism.world_size > 1 and not run.plan.ref_channel.capabilities.replayable:
        raise ConfigError(
            f"channel {run.plan.ref_channel.name!r} has one reader, so one rank can train from it",
            where="channel",
            hint="train with several ranks from offline features (topology: offline)",
        )
    with run.directory.lock("train") if run.parallelism.rank == 0 else nullcontext():
        if run.plan.feature_reuse:
            check_features(run.directory.split("train"), run.manifest("train"))
        return run.trainer().fit()


def capture_and_train(run: Run) -> Outcome:
    """Both halves in this process: one after the other where features are captured once, else side by side."""
    check_device(run.plan.config.training.device)  # before hours of capture
    if run.plan.feature_reuse:
        capture(run)
        return train(run)
    with run.directory.lock("capture"):
        _capture_once(run, "eval")
        return _side_by_side(run)


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
            _capture_each_epoch(run)
        except RunStopped:
            pass
        except BaseException as error:  # noqa: BLE001 - a thread boundary: raised again by the thread that trains
            failures.append(error)
            run.stop.request(f"capture failed: {error}")

    # constructed here, before there are two threads that could each construct their own
    _ = run.engine, run.strategy, run.wires("train"), run.order, run.window_plan, run.checkpoint_reader
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


def _capture_once(run: Run, split: Split) -> None:
    """Capture a split for every epoch to come; goes on where an interrupted capture stopped."""
    if split == "eval" and not run.plan.config.data.eval:
        return
    prompts = run.prompts(split)
    record_features(run.directory.split(split), run.manifest(split))
    writer = run.wires(split).channel.writer(WRITER)
    done = len(writer.published())
    _capture(run, split, writer, [_Pass(prompts, epoch=0, start=done)] if done < len(prompts) else [])


def _capture_each_epoch(run: Run) -> None:
    """Capture the training prompts anew for each epoch, in its order, from where the latest checkpoint stands."""
    first, place = run.window_plan.place(run.checkpoint_reader.latest_step() or 0)
    passes = [
        _Pass(OrderedPrompts(run.prompts("train"), run.order.epoch(epoch)), epoch, place.start if epoch == first else 0)
        for epoch in range(first, run.plan.config.training.epochs)
    ]
    _capture(run, "train", run.wires("train").channel.writer(WRITER), passes)


def _capture(run: Run, split: Split, writer: RefWriter, passes: Sequence[_Pass]) -> None:
    """Drive the capture loop and tell the reader how it ended."""
    try:
        loop = run.capture_loop(split, writer)
        for part in passes:
            loop.run(part.prompts, epoch=part.epoch, start=part.start)
    except RunStopped:
        raise  # neither closed nor failed: what was published is whole, and another capture may go on after it
    except BaseException as error:
        writer.fail(str(error) or type(error).__name__)
        raise
    writer.close()
