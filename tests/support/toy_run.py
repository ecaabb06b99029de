# SPDX-License-Identifier: Apache-2.0
"""A whole training run over the toy strategy: random features in a store of their own, everything else real.

Run as a program it trains in a directory until it is done or killed; the fault tests do that.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from specforge_core.checkpoint.resume import CheckpointReader
from specforge_core.checkpoint.writer import CheckpointWriter
from specforge_core.config.run_config import LoadingSection
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LOSS_MASK,
    CaptureRequest,
    FeatureGone,
    FeatureStore,
    LeaseDesk,
    Prompt,
    RefReader,
    Sample,
    SampleRef,
    SilentProgress,
    StaleRef,
    StopSignal,
    Strategy,
    Usage,
    sample_id,
)
from specforge_core.features.ledger import Ledger, NoLedger
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.demand import Demand, NothingWanted, PlannedBatch
from specforge_core.loading.held_out import HeldOut
from specforge_core.loading.loader import Loader, LoaderParts
from specforge_core.loading.order import PromptOrder
from specforge_core.loading.planned import plan_epochs
from specforge_core.loading.sample_reader import SampleReader
from specforge_core.loading.supply import Free, Supply, SupplyParts
from specforge_core.loading.trusted_refs import TrustedRefs
from specforge_core.loading.windows import WindowPlan
from specforge_core.training.evaluator import Evaluator
from specforge_core.training.metrics_log import MetricsLog
from specforge_core.training.observers import Observer, Observers
from specforge_core.training.optimizer import DraftOptimizer
from specforge_core.training.parallelism import Parallelism, SingleProcess
from specforge_core.training.schedule import Schedule
from specforge_core.training.trainer import Trainer, TrainerParts
from specforge_core.training.window_step import WindowStep
from torch import nn
from toy_strategy import HIDDEN, VOCABULARY, ToyStrategy, build_draft


def make_sample(index: int, epoch: int = 0) -> Sample:
    """The same bits whenever it is made; every fifth prompt trains nothing."""
    generator = torch.Generator().manual_seed(index)
    tokens = 3 + index * 7 % 9
    mask = torch.rand(tokens, generator=generator) < 0.7
    features = {
        INPUT_IDS: torch.randint(VOCABULARY, (tokens,), generator=generator),
        LOSS_MASK: mask & torch.tensor(index % 5 != 4),
        AUX_HIDDEN_STATES: torch.randn(tokens, 1, HIDDEN, generator=generator),
    }
    return Sample(f"p{index}", epoch, features)


class DictStore(FeatureStore):
    """Features in a dictionary."""

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self._generations: dict[str, int] = defaultdict(int)

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        self.samples[sample_id] = sample
        self._generations[sample_id] += 1
        generation, tokens = self._generations[sample_id], sample.num_tokens
        return SampleRef(sample_id, generation, "dict", sample.specs(), tokens, sample.prompt_id, sample.epoch)

    def get(self, ref: SampleRef) -> Sample:
        if ref.sample_id not in self.samples:
            raise FeatureGone("these features were deleted")
        if self._generations[ref.sample_id] != ref.generation:
            raise StaleRef("these features were replaced")
        return self.samples[ref.sample_id]

    def delete(self, ref: SampleRef) -> None:
        if self._generations[ref.sample_id] == ref.generation:
            self.samples.pop(ref.sample_id, None)

    def usage(self) -> Usage:
        return Usage(len(self.samples), 0)

    def close(self) -> None:
        pass


class QueueReader(RefReader):
    """Refs from a list that another thread may fill."""

    def __init__(self, refs: Sequence[SampleRef] = (), *, closed: bool = True) -> None:
        self._changed = threading.Condition()
        self._refs = list(refs)
        self._closed = closed
        self.acked: list[tuple[str, int]] = []
        self.failure: str | None = None

    def publish(self, refs: Sequence[SampleRef], *, closed: bool = False) -> None:
        with self._changed:
            self._refs += refs
            self._closed = closed
            self._changed.notify_all()

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        with self._changed:
            self._changed.wait_for(lambda: self._refs or self._closed, timeout)
            out, self._refs = self._refs[:max_refs], self._refs[max_refs:]
            return out

    @property
    def drained(self) -> bool:
        return self._closed and not self._refs

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        self.acked += [(name, step) for name in sample_ids]

    def fail(self, reason: str) -> None:
        self.failure = reason

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Prompts:
    count: int
    first: int = 0
    make_sample: Callable[[int, int], Sample] = make_sample

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Prompt:
        features = self.make_sample(self.first + index, 0).features
        return Prompt(self.prompt_id(index), features[INPUT_IDS].tolist(), features[LOSS_MASK].int().tolist())

    def prompt_id(self, index: int) -> str:
        return f"p{self.first + index}"


@dataclass(kw_only=True)
class ToyRun:
    """One run's settings; ``trainer()`` assembles it as the command line would.

    :param desk: where the run says what it wants captured; None: everything is captured before, as offline.
    """

    directory: Path
    prompts: int = 14
    global_batch_size: int = 4
    micro_batch_size: int = 4
    epochs: int = 3
    checkpoint_every: int = 3
    dtype: torch.dtype = torch.float32
    learning_rate: float = 0.05
    reuse_features: bool = True
    free: Free = "never"
    sort_by_length: bool = True
    strategy: Strategy = field(default_factory=ToyStrategy)
    build_draft: Callable[[], nn.Module] = build_draft
    make_sample: Callable[[int, int], Sample] = make_sample
    parallelism: Parallelism = field(default_factory=SingleProcess)
    stop: StopSignal = field(default_factory=StopSignal)
    observers: tuple[Observer, ...] = ()
    store: FeatureStore = field(default_factory=DictStore)
    reader: RefReader | None = None
    desk: LeaseDesk | None = None
    capture_batch_size: int = 3
    watermarks: Watermarks = field(default_factory=lambda: Watermarks(high_watermark_refs=16, low_watermark_refs=8))
    check: Callable[[SampleRef], None] = lambda ref: None

    def publish_all(self) -> list[SampleRef]:
        """Capture every sample of the run."""
        epochs = 1 if self.reuse_features else self.epochs
        return [
            self.store.put(sample_id(f"p{i}", epoch), self.make_sample(i, epoch))
            for epoch in range(epochs)
            for i in self.order.epoch(epoch)
        ]

    @property
    def plan(self) -> WindowPlan:
        return WindowPlan(
            num_prompts=self.prompts,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            epochs=self.epochs,
            sort_by_length=self.sort_by_length,
            rank=self.parallelism.rank,
            world_size=self.parallelism.world_size,
        )

    @property
    def order(self) -> PromptOrder:
        return PromptOrder(self.prompts, seed=7, shuffle=True)

    def planned(self, start: int) -> Iterator[PlannedBatch]:
        """The batches that windows ``start`` and later need."""
        return plan_epochs(
            self.plan, self.order, self._describe, size=self.capture_batch_size, fingerprint="toy", start=start
        )

    def _describe(self, epoch: int) -> Callable[[int], tuple[str, int]]:
        def describe(index: int) -> tuple[str, int]:
            specs = self.make_sample(index, epoch).specs()
            return sample_id(f"p{index}", epoch), sum(spec.nbytes for spec in specs)

        return describe

    def ledger(self) -> Ledger | NoLedger:
        if self.parallelism.rank != 0:
            return NoLedger()
        self.directory.mkdir(parents=True, exist_ok=True)
        return Ledger(self.directory / "ledger.sqlite", run_id="toy")

    def supply(self, deadline_seconds: float = 20.0) -> Supply:
        self.reader = self.reader or QueueReader(self.publish_all())
        parts = SupplyParts(
            reader=self.reader,
            store=self.store,
            ledger=self.ledger(),
            demand=NothingWanted() if self.desk is None else Demand(self.desk, self.watermarks),
            trusted=TrustedRefs(self.check),
            progress=SilentProgress(),
            stop=self.stop,
            reuse_features=self.reuse_features,
            free=self.free,
            deadline_seconds=deadline_seconds,
        )
        return Supply(parts)

    def loader(self, deadline_seconds: float = 20.0) -> Loader:
        parts = LoaderParts(
            supply=self.supply(deadline_seconds),
            samples=self.samples(self.store),
            strategy=self.strategy,
            prompts=Prompts(self.prompts, make_sample=self.make_sample),
            order=self.order,
            planned=self.planned,
            progress=SilentProgress(),
            stop=self.stop,
        )
        settings = LoadingSection(deadline_seconds=deadline_seconds)
        return Loader(parts, plan=self.plan, settings=settings, seed=7)

    def step(self) -> WindowStep:
        draft = self.build_draft().to(self.dtype)
        self.parallelism.prepare(draft)
        return WindowStep(
            strategy=self.strategy,
            draft=draft,
            optimizer=DraftOptimizer(draft, weight_decay=0.0),
            schedule=Schedule(peak=self.learning_rate, warmup_ratio=0.1, total_steps=self.plan.total_windows),
            parallelism=self.parallelism,
            max_grad_norm=0.5,
            device="cpu",
        )

    def samples(self, store: FeatureStore) -> SampleReader:
        """Reads what ``make_sample`` makes."""
        sample = self.make_sample(0, 0)
        _, layers, hidden_size = sample.features[AUX_HIDDEN_STATES].shape
        request = CaptureRequest(aux_layer_ids=tuple(range(layers)), last_hidden_norm=sample.last_hidden_norm)
        return SampleReader(store=store, request=request, hidden_size=hidden_size)

    def held_out(self) -> HeldOut:
        store = DictStore()
        refs = [store.put(f"h{i}.e0", self.make_sample(100 + i, 0)) for i in range(5)]
        return HeldOut(
            reader=self.samples(store),
            refs=refs,
            prompts=Prompts(5, first=100, make_sample=self.make_sample),
            strategy=self.strategy,
            micro_batch_size=2,
            seed=7,
            rank=self.parallelism.rank,
            world_size=self.parallelism.world_size,
        )

    def trainer(self) -> Trainer:
        provenance = {"config": {"training": {"global_batch_size": self.global_batch_size, "epochs": self.epochs}}}
        log = MetricsLog(self.directory / "metrics.jsonl", evaluations=self.directory / "evaluations.jsonl")
        total = self.plan.total_windows
        parts = TrainerParts(
            loader=self.loader(),
            step=self.step(),
            evaluator=Evaluator(strategy=self.strategy, device="cpu", total_steps=total, parallelism=self.parallelism),
            held_out=self.held_out(),
            writer=CheckpointWriter(self.directory / "checkpoints", keep=2, provenance=provenance),
            reader=CheckpointReader(self.directory / "checkpoints", provenance),
            observers=Observers([log, *self.observers] if self.parallelism.rank == 0 else self.observers),
            progress=SilentProgress(),
            checkpoint_every_steps=self.checkpoint_every,
        )
        return Trainer(parts)

    def weights(self) -> dict[str, torch.Tensor]:
        """Train to the end; everything training would go on from."""
        trainer = self.trainer()
        trainer.fit()
        return {name: tensor.clone() for name, tensor in trainer.step.optimizer.state().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    names = [name for name in a if name.startswith("draft.")]
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ToyRun(directory=Path(sys.argv[1]), epochs=int(sys.argv[2]), checkpoint_every=int(sys.argv[3])).trainer().fit()
