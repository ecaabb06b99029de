# SPDX-License-Identifier: Apache-2.0
"""What is done with a trained draft: evaluate it, export it, bench it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from specforge_core.checkpoint.resume import load_draft
from specforge_core.contracts import CaptureRequest, DataError, ExportError, PlanError
from specforge_core.decoding.bench import BenchSides, cut_prompts, run_bench
from specforge_core.decoding.bench_result import BenchResult
from specforge_core.decoding.speculative import DecodeLimits
from specforge_core.export.writer import ExportPlan, check_export, export_draft
from specforge_core.run.assemble import Run
from specforge_core.run.directory import write_json
from specforge_core.run.machine import check_device, set_threads
from specforge_core.training.evaluator import Evaluation

Which = Literal["latest", "best"]


@dataclass(frozen=True, slots=True)
class TrainedDraft:
    """A draft and where it comes from: a checkpoint of so many optimizer steps, or an export."""

    draft: nn.Module
    source: str
    step: int | None = None


def load_checkpoint(run: Run, which: Which | Path = "latest") -> TrainedDraft:
    """The run's draft from a checkpoint (fp32 masters).

    :param which: ``latest``, ``best``, or a checkpoint's directory.
    :raises CheckpointError: there is none, or it is not this draft's.
    """
    draft = run.new_draft()
    if isinstance(which, Path):
        step = load_draft(which, draft)
        return TrainedDraft(draft, str(which), step)
    step = load_draft(run.directory.checkpoints, draft, which=which)
    return TrainedDraft(draft, f"checkpoint of step {step}", step)


def evaluate_draft(run: Run, trained: TrainedDraft) -> Evaluation:
    """Evaluate on the held-out features; written to ``eval.json``.

    :raises DataError: the run has no held-out features.
    """
    check_device(run.plan.config.training.device)
    held_out = run.held_out()
    if held_out is None:
        raise DataError(
            "the run has no held-out prompts", where="data.eval", hint="name held-out prompts there and capture again"
        )
    draft = trained.draft.to(run.plan.config.training.device)
    evaluation = run.evaluator().run(draft, held_out, step=trained.step or 0)
    counts = [asdict(ratio) for ratio in evaluation.position_accuracy]
    result: dict[str, Any] = {"draft": trained.source, **evaluation.values(), "position_accuracy": counts}
    write_json(run.directory.evaluation, result)
    return evaluation


def write_export(run: Run, trained: TrainedDraft, *, format: str | None, overwrite: bool) -> Path:
    """Export in one of the strategy's formats (its first by default), reload it and compare.

    :raises ExportError: a format the strategy does not write, or what was written does not reload to the same.
    """
    formats = run.plan.strategy.export_formats
    if not formats:
        raise ExportError(f"strategy {run.plan.strategy.name!r} exports nothing")
    if format is not None and format not in formats:
        raise ExportError(
            f"strategy {run.plan.strategy.name!r} does not write {format!r}",
            where="--format",
            hint=f"choose one of: {', '.join(formats)}",
        )
    chosen = format or formats[0]
    prompts = run.prompts("train")
    made_on = {"prompts": prompts.fingerprint, **({"origins": prompts.origins} if prompts.origins else {})}
    parts = {"strategy": run.plan.strategy.name, "step": trained.step, "plugins": run.plan.provenance}
    plan = ExportPlan(
        directory=run.directory.export(chosen),
        format=chosen,
        provenance={**parts, **made_on},
        overwrite=overwrite,
    )
    return export_draft(run.strategy, trained.draft, run.frozen_source(), plan=plan)


def load_exported(run: Run, directory: Path) -> TrainedDraft:
    """A draft from an export, as a server would read it.

    :raises ExportError: it is not an export of this strategy for this target, or was altered since it was written.
    """
    check_export(directory)
    return TrainedDraft(run.strategy.load_export(directory, run.frozen_source()), str(directory))


def bench_draft(run: Run, trained: TrainedDraft) -> BenchResult:
    """Greedy speculative decoding of held-out prompts against plain decoding; written to ``bench.json``.

    :raises PlanError: the target engine cannot decode in this process.
    :raises DataError: there are no held-out prompts.
    """
    plan, settings = run.plan, run.plan.config.bench
    if not plan.target_engine.capabilities.decodes:
        raise PlanError([f"target engine {plan.target_engine.name!r} captures only; bench needs one that decodes"])
    if not plan.config.data.eval:
        raise DataError("there are no held-out prompts to decode", where="data.eval", hint="name them there")
    set_threads(settings.threads)
    result = run_bench(
        cut_prompts(run.prompts("eval"), settings),
        sides=BenchSides(
            plain=run.engine.decoder(CaptureRequest()),
            speculative=run.engine.decoder(plan.request),
            drafter=run.strategy.drafter(trained.draft.eval(), run.frozen_source()),
        ),
        limits=DecodeLimits(max_new_tokens=settings.max_new_tokens, eos_token_ids=plan.info.eos_token_ids),
        draft_tokens=settings.draft_tokens,
        facts={
            "target": plan.info.name_or_path,
            "target_dtype": plan.info.dtype,
            "strategy": plan.strategy.name,
            "draft": trained.source,
            "draft_parameters": sum(p.numel() for p in trained.draft.parameters() if p.requires_grad),
            "draft_dtype": str(next(trained.draft.parameters()).dtype).removeprefix("torch."),
        },
        progress=run.progress("bench"),
    )
    write_json(run.directory.bench, result.to_json())
    return result
