# SPDX-License-Identifier: Apache-2.0
"""From a plan to the parts of a run: the only constructor site. ``roles`` drives what is constructed here.

Every part is constructed when it is first needed, so a role constructs only what it uses: training offline features
loads no target model, capturing constructs no draft.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from specforge_core.capture.backpressure import Watermarks
from specforge_core.capture.loop import CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.checkpoint.resume import CheckpointReader
from specforge_core.checkpoint.writer import CheckpointWriter
from specforge_core.config.plan import Plan
from specforge_core.contracts import (
    FeatureStore,
    FrozenSource,
    PartContext,
    Progress,
    RefChannel,
    RefWriter,
    StopSignal,
    Strategy,
    TargetEngine,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileChannelConfig, FileStoreConfig
from specforge_core.hooks.descriptors import resolve
from specforge_core.loading.held_out import HeldOut
from specforge_core.loading.loader import Loader, LoaderParts
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.windows import WindowPlan
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_set import PromptSet
from specforge_core.run.directory import RunDirectory, Split
from specforge_core.run.feature_manifest import check_features, describe_features
from specforge_core.run.frozen_source import RunFrozenSource
from specforge_core.run.observing import RunRecord
from specforge_core.run.provenance import describe_run
from specforge_core.run.ranks import join_ranks
from specforge_core.run.sealed_refs import read_all
from specforge_core.training.evaluator import Evaluator
from specforge_core.training.metrics_log import MetricsLog
from specforge_core.training.observers import Observer, Observers
from specforge_core.training.optimizer import DraftOptimizer
from specforge_core.training.parallelism import Parallelism
from specforge_core.training.schedule import Schedule
from specforge_core.training.trainer import Trainer, TrainerParts
from specforge_core.training.window_step import WindowStep


@dataclass(frozen=True, slots=True)
class Wires:
    """What joins the two halves: where tensors and where metadata go."""

    store: FeatureStore
    channel: RefChannel


class Run:
    """One run's parts.

    :param observers: told what training does, besides those that core itself needs.
    :param progress: gives each half (``capture``, ``train``) its own progress.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        stop: StopSignal,
        progress: Callable[[str], Progress],
        observers: Sequence[Observer] = (),
    ) -> None:
        self.plan = plan
        self.stop = stop
        self.progress = progress
        self.directory = RunDirectory.of(plan.config)
        self._observers = observers
        self._prompts: dict[Split, PromptSet] = {}
        self._wires: dict[Split, Wires] = {}
        self._constructing = threading.Lock()

    @cached_property
    def parallelism(self) -> Parallelism:
        config = self.plan.config
        return join_ranks(device=config.training.device, timeout_seconds=config.loading.deadline_seconds)

    @cached_property
    def engine(self) -> TargetEngine:
        engine: TargetEngine = resolve(self.plan.target_engine.factory)(self.plan.target_section)
        return engine

    @cached_property
    def strategy(self) -> Strategy:
        strategy: Strategy = resolve(self.plan.strategy.factory)(self.plan.strategy_section)
        return strategy

    @cached_property
    def order(self) -> PromptOrder:
        config = self.plan.config
        return PromptOrder(len(self.prompts("train")), seed=config.run.seed, shuffle=config.training.shuffle)

    @cached_property
    def window_plan(self) -> WindowPlan:
        training, loading = self.plan.config.training, self.plan.config.loading
        return WindowPlan(
            num_prompts=len(self.prompts("train")),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            epochs=training.epochs,
            max_steps=training.max_steps,
            sort_by_length=loading.sort_by_length,
            rank=self.parallelism.rank,
            world_size=self.parallelism.world_size,
        )

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return describe_run(self.plan.resolved(), self.plan.provenance, prompts=self.prompts("train").fingerprint)

    @cached_property
    def checkpoint_reader(self) -> CheckpointReader:
        return CheckpointReader(self.directory.checkpoints, self.provenance)

    def prompts(self, split: Split) -> PromptSet:
        """The prepared prompts of a split; prepared now unless they were before."""
        if split not in self._prompts:
            data = self.plan.config.data
            self._prompts[split] = prepare_prompts(
                data.train if split == "train" else data.eval,
                directory=self.directory.prompts(split),
                tokenizer=lambda: resolve(self.plan.target_engine.tokenizer)(self.plan.target_section),
                settings=data if split == "train" else data.model_copy(update={"max_prompts": None}),
                vocab_size=self.plan.info.vocab_size,
                progress=self.progress("capture"),
            )
        return self._prompts[split]

    def manifest(self, split: Split) -> dict[str, Any]:
        """What this run's features of a split are features of."""
        return describe_features(self.plan.info, self.plan.request, prompts=self.prompts(split).fingerprint)

    def wires(self, split: Split) -> Wires:
        """The run's store and channel for training; files for held-out features, which are captured once and kept.

        Both halves get the same ones, also when two threads ask at once: a channel of each half's own would leave
        the reader waiting for what the other channel holds.
        """
        with self._constructing:
            if split not in self._wires:
                self._wires[split] = self._open_wires(split)
            return self._wires[split]

    def _open_wires(self, split: Split) -> Wires:
        context = PartContext(run_id=str(self.directory.root.resolve()), directory=self.directory.split(split))
        if split == "eval":
            files = FileStoreConfig(name="file"), FileChannelConfig(name="file")
            return Wires(FileStore(files[0], context), FileChannel(files[1], context))
        plan = self.plan
        store: FeatureStore = resolve(plan.feature_store.factory)(plan.store_section, context)
        channel: RefChannel = resolve(plan.ref_channel.factory)(plan.channel_section, context)
        return Wires(store, channel)

    def capture_loop(self, split: Split, writer: RefWriter) -> CaptureLoop:
        """The capture loop; held back by training only where training frees what is captured."""
        settings, window = self.plan.config.capture, self.plan.config.training.global_batch_size
        free_running = split == "eval" or self.plan.feature_reuse
        watermarks = Watermarks(
            high_watermark_refs=settings.high_watermark_windows * window,
            low_watermark_refs=settings.low_watermark_windows * window,
            high_watermark_bytes=settings.high_watermark_bytes,
        )
        return CaptureLoop(
            CaptureParts(engine=self.engine, request=self.plan.request, store=self.wires(split).store, writer=writer),
            limits=CaptureLimits(
                batch_size=settings.batch_size,
                watermarks=None if free_running else watermarks,
                deadline_seconds=self.plan.config.loading.deadline_seconds,
            ),
            progress=self.progress("capture"),
            stop=self.stop,
        )

    def frozen_source(self) -> FrozenSource:
        return RunFrozenSource(self.engine, self.prompts("train"))

    def new_draft(self) -> nn.Module:
        """A draft with its first parameters, which depend on the run's seed alone (fp32, on CPU)."""
        torch.manual_seed(self.plan.config.run.seed)
        return self.strategy.build_draft(self.frozen_source())

    def held_out(self) -> HeldOut | None:
        """The held-out features, or None where the run has none. :raises DataError: they are of something else."""
        config = self.plan.config
        if not config.data.eval:
            return None
        check_features(self.directory.split("eval"), self.manifest("eval"))
        wires = self.wires("eval")
        return HeldOut(
            store=wires.store,
            refs=read_all(wires.channel, expected=len(self.prompts("eval"))),
            strategy=self.strategy,
            micro_batch_size=config.evaluation.micro_batch_size or config.training.micro_batch_size,
            seed=config.run.seed,
            rank=self.parallelism.rank,
            world_size=self.parallelism.world_size,
        )

    def evaluator(self) -> Evaluator:
        return Evaluator(
            strategy=self.strategy,
            device=self.plan.config.training.device,
            total_steps=self.window_plan.total_windows,
            parallelism=self.parallelism,
        )

    def loader(self) -> Loader:
        config, wires = self.plan.config, self.wires("train")
        parts = LoaderParts(
            reader=wires.channel.reader(),
            store=wires.store,
            strategy=self.strategy,
            prompts=self.prompts("train"),
            order=self.order,
            progress=self.progress("train"),
            stop=self.stop,
            reuse_features=self.plan.feature_reuse,
            free="never" if self.plan.feature_reuse else "window",
        )
        return Loader(parts, plan=self.window_plan, settings=config.loading, seed=config.run.seed)

    def window_step(self) -> WindowStep:
        training, defaults = self.plan.config.training, self.plan.strategy_section.optimizer_defaults
        draft = self.new_draft().to(device=training.device, dtype=getattr(torch, training.dtype))
        self.parallelism.prepare(draft)
        return WindowStep(
            strategy=self.strategy,
            draft=draft,
            optimizer=DraftOptimizer(draft, weight_decay=training.weight_decay),
            schedule=Schedule(
                peak=training.learning_rate or defaults.learning_rate,
                warmup_ratio=defaults.warmup_ratio if training.warmup_ratio is None else training.warmup_ratio,
                total_steps=self.window_plan.total_windows,
            ),
            parallelism=self.parallelism,
            max_grad_norm=training.max_grad_norm or defaults.max_grad_norm,
            device=training.device,
        )

    def trainer(self) -> Trainer:
        config = self.plan.config
        parts = TrainerParts(
            loader=self.loader(),
            step=self.window_step(),
            evaluator=self.evaluator(),
            held_out=self.held_out(),
            writer=CheckpointWriter(
                self.directory.checkpoints, keep=config.checkpoint.keep, provenance=self.provenance
            ),
            reader=self.checkpoint_reader,
            observers=Observers(self._all_observers() if self.parallelism.rank == 0 else []),
            progress=self.progress("train"),
            checkpoint_every_steps=config.checkpoint.every_steps,
            evaluate_every_steps=config.evaluation.every_steps,
        )
        return Trainer(parts)

    def _all_observers(self) -> list[Observer]:
        return [
            RunRecord(self.directory, config=self.plan.resolved(), provenance=self.provenance),
            MetricsLog(self.directory.metrics, evaluations=self.directory.evaluations),
            *self._observers,
        ]

    def close(self) -> None:
        """Give back what was opened. Idempotent."""
        for wires in self._wires.values():
            wires.store.close()
        if "engine" in self.__dict__:
            self.engine.close()
        if "parallelism" in self.__dict__:
            self.parallelism.close()
