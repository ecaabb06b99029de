# SPDX-License-Identifier: Apache-2.0
"""From a plan to the parts of a run: the only constructor site. ``roles`` drives what is constructed here.

Every part is constructed when it is first needed, so a role constructs only what it uses: training offline features
loads no target model, capturing constructs no draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from specforge_core.capture.loop import CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.checkpoint.resume import CheckpointReader
from specforge_core.checkpoint.writer import CheckpointWriter
from specforge_core.config.plan import Plan
from specforge_core.contracts import (
    FrozenSource,
    LeaseDesk,
    Progress,
    RefWriter,
    Split,
    StopSignal,
    Strategy,
    TargetEngine,
    held_out_sample_id,
)
from specforge_core.hooks.descriptors import resolve
from specforge_core.loading.held_out import HeldOut, HeldOutCopy
from specforge_core.loading.loader import Loader, LoaderParts
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.sample_reader import SampleReader
from specforge_core.loading.windows import WindowPlan
from specforge_core.run.batches import RunBatches
from specforge_core.run.directory import RunDirectory
from specforge_core.run.feature_manifest import check_features, describe_features, record_features
from specforge_core.run.frozen_source import RunFrozenSource
from specforge_core.run.observing import RunRecord
from specforge_core.run.prompts import RunPrompts
from specforge_core.run.provenance import describe_run
from specforge_core.run.ranks import join_ranks
from specforge_core.run.sealed_refs import read_all
from specforge_core.run.train_end import TrainEnd
from specforge_core.run.wires import RunWires
from specforge_core.training.evaluator import Evaluator
from specforge_core.training.metrics_log import MetricsLog
from specforge_core.training.observers import Observer, Observers
from specforge_core.training.optimizer import DraftOptimizer
from specforge_core.training.parallelism import Parallelism
from specforge_core.training.schedule import Schedule
from specforge_core.training.trainer import Trainer, TrainerParts
from specforge_core.training.window_step import WindowStep


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
        self.batches = RunBatches(plan, prompts=lambda split: self.prompts(split), order=lambda: self.order)
        self.wires = RunWires(plan, self.directory, fingerprint=self.batches.fingerprint)

    @cached_property
    def prompts(self) -> RunPrompts:
        return RunPrompts(self.plan, progress=self.progress("prompts"), stop=self.stop)

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
        prompts = self.prompts("train")
        return describe_run(
            self.plan.resolved(), self.plan.provenance, prompts=prompts.fingerprint, origins=prompts.origins
        )

    @cached_property
    def checkpoint_reader(self) -> CheckpointReader:
        return CheckpointReader(self.directory.checkpoints, self.provenance)

    def manifest(self, split: Split) -> dict[str, Any]:
        """What this run's features of a split are features of."""
        return describe_features(self.plan.info, self.plan.request, prompts=self.prompts(split).fingerprint)

    def capture_loop(self, split: Split, *, writer: RefWriter, desk: LeaseDesk, name: str) -> CaptureLoop:
        """The capture loop over the wires of a split. ``name`` is the writer's."""
        config, wires = self.plan.config, self.wires[split]
        return CaptureLoop(
            CaptureParts(
                engine=self.engine,
                request=self.plan.request,
                store=wires.store,
                writer=writer,
                desk=desk,
                prompts=self.batches.prompts_of,
                sign=self.wires.sign,
                holder=name,
            ),
            limits=CaptureLimits(
                max_attempts=config.capture.max_attempts,
                deadline_seconds=config.loading.deadline_seconds,
                room_seconds=0.0 if self.plan.feature_reuse else config.loading.deadline_seconds,
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

    def held_out_ids(self) -> list[str]:
        """The sample id of each held-out prompt, in their order."""
        prompts = self.prompts("eval")
        return [held_out_sample_id(prompts.prompt_id(index)) for index in range(len(prompts))]

    def held_out(self) -> HeldOut | None:
        """The held-out features, or None where the run has none. :raises DataError: they are of something else."""
        config = self.plan.config
        if not config.data.eval:
            return None
        check_features(self.directory.split("eval"), self.manifest("eval"))
        return HeldOut(
            reader=self.sample_reader("eval"),
            refs=read_all(self.wires["eval"].channel, self.held_out_ids(), trusted=self.wires.trusted),
            prompts=self.prompts("eval"),
            strategy=self.strategy,
            micro_batch_size=config.evaluation.micro_batch_size or config.training.micro_batch_size,
            seed=config.run.seed,
            rank=self.parallelism.rank,
            world_size=self.parallelism.world_size,
        )

    def sample_reader(self, split: Split) -> SampleReader:
        """Reads captured samples of a split, checked against what this run asks for."""
        return SampleReader(
            store=self.wires[split].store, request=self.plan.request, hidden_size=self.plan.info.hidden_size
        )

    def evaluator(self) -> Evaluator:
        return Evaluator(
            strategy=self.strategy,
            device=self.plan.config.training.device,
            total_steps=self.window_plan.total_windows,
            parallelism=self.parallelism,
        )

    @cached_property
    def train_end(self) -> TrainEnd:
        return TrainEnd(
            self.plan,
            self.wires,
            ledger=self.directory.ledger if self.parallelism.rank == 0 else None,
            progress=self.progress("train"),
            stop=self.stop,
        )

    def copy_held_out(self) -> None:
        """Online: have the held-out prompts captured, once, and keep their features beside the run."""
        record_features(self.directory.split("eval"), self.manifest("eval"))
        kept = self.wires["eval"]
        HeldOutCopy(
            supply=self.train_end.supply,
            source=self.sample_reader("train"),
            kept=kept.store,
            writer=kept.channel.writer("held-out"),
            sign=self.wires.sign,
            progress=self.progress("train"),
        ).collect(self.prompts("eval"), self.held_out_ids(), self.batches.planned_once("eval"))

    def loader(self) -> Loader:
        config = self.plan.config
        parts = LoaderParts(
            supply=self.train_end.supply,
            samples=self.sample_reader("train"),
            strategy=self.strategy,
            prompts=self.prompts("train"),
            order=self.order,
            planned=lambda start: self.batches.planned(self.window_plan, start),
            progress=self.progress("train"),
            stop=self.stop,
        )
        return Loader(parts, plan=self.window_plan, settings=config.loading, seed=config.run.seed)

    def window_step(self) -> WindowStep:
        training, optimizer = self.plan.config.training, self.plan.optimizer
        draft = self.new_draft().to(device=training.device, dtype=getattr(torch, training.dtype))
        self.parallelism.prepare(draft)
        return WindowStep(
            strategy=self.strategy,
            draft=draft,
            optimizer=DraftOptimizer(draft, weight_decay=training.weight_decay),
            schedule=Schedule(
                peak=optimizer.learning_rate,
                warmup_ratio=optimizer.warmup_ratio,
                total_steps=self.window_plan.total_windows,
            ),
            parallelism=self.parallelism,
            max_grad_norm=optimizer.max_grad_norm,
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
        if "train_end" in self.__dict__:
            self.train_end.close()
        self.wires.close()
        if "engine" in self.__dict__:
            self.engine.close()
        if "parallelism" in self.__dict__:
            self.parallelism.close()
