# SPDX-License-Identifier: Apache-2.0
"""The trainer's parts on their own: schedule, optimizer, metrics log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import Ratio
from specforge_core.training.evaluator import Evaluation
from specforge_core.training.metrics_log import MetricsLog
from specforge_core.training.optimizer import DraftOptimizer
from specforge_core.training.schedule import Schedule
from specforge_core.training.window_step import WindowResult
from torch import nn


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.2), (1, 0.4), (3, 0.8), (4, 1.0), (12, 0.5), (20, 0.0), (21, 0.0), (1000, 0.0)],
)
def test_warm_up_then_cosine_then_zero(step: int, rate: float) -> None:
    schedule = Schedule(peak=1.0, warmup_ratio=0.2, total_steps=20)
    assert schedule.learning_rate(step) == pytest.approx(rate)


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert Schedule(peak=2.0, warmup_ratio=0.0, total_steps=1).learning_rate(0) == 2.0


def _step(draft: nn.Module, optimizer: DraftOptimizer, passes: int) -> None:
    optimizer.clear_gradients()
    for _ in range(passes):
        (draft(torch.ones(1, 4, dtype=next(draft.parameters()).dtype)).float().square().sum() / passes).backward()
    optimizer.gradients()
    optimizer.step(0.01)


def test_fp32_parameters_are_their_own_masters() -> None:
    draft = nn.Linear(4, 2)
    optimizer = DraftOptimizer(draft, weight_decay=0.0)
    assert all(optimizer.masters[name] is parameter for name, parameter in draft.named_parameters())
    reference = nn.Linear(4, 2)
    reference.load_state_dict(draft.state_dict())
    plain = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0, foreach=False)
    for _ in range(5):
        _step(draft, optimizer, passes=1)
        plain.zero_grad()
        reference(torch.ones(1, 4)).square().sum().backward()
        plain.step()
    torch.testing.assert_close(draft.weight, reference.weight, atol=1e-6, rtol=0)


def test_masters_move_where_bf16_could_not() -> None:
    draft = nn.Linear(4, 2).to(torch.bfloat16)
    optimizer = DraftOptimizer(draft, weight_decay=0.0)
    before = optimizer.masters["weight"].clone()
    optimizer.clear_gradients()
    for _ in range(3):
        draft(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        assert draft.weight.grad is None, "moved to the master at once"
    assert torch.equal(optimizer.gradients()[0], torch.full((2, 4), 3.0))
    optimizer.step(1e-6)
    moved = optimizer.masters["weight"] - before
    assert bool((moved < 0).all())
    assert torch.equal(draft.weight, optimizer.masters["weight"].to(torch.bfloat16))


def test_frozen_parameters_are_left_alone() -> None:
    draft = nn.Linear(4, 2)
    draft.bias.requires_grad_(False)
    assert list(DraftOptimizer(draft, weight_decay=0.0).masters) == ["weight"]


def _result(step: int) -> WindowResult:
    return WindowResult(
        step=step,
        epoch=0,
        loss=0.1 * step,
        learning_rate=1e-3,
        grad_norm=0.5,
        num_tokens=100,
        seconds=1.5,
        waited_seconds=0.5,
        position_accuracy=[Ratio(1, 2), Ratio(1, 4)],
        metrics={"kept": Ratio(3, 4), "nothing": Ratio(0, 0)},
    )


def test_a_line_holds_what_the_step_was(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", evaluations=tmp_path / "evaluations.jsonl")
    log.run_started(0, 10)
    log.window_trained(_result(1))
    log.evaluated(1, Evaluation(loss=None, position_accuracy=[], metrics={}))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {
        "step": 1,
        "epoch": 0,
        "loss": 0.1,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_second": 50.0,
        "seconds": 1.5,
        "waited_seconds": 0.5,
        "simulated_acceptance_length": 1 + 0.5 + 0.125,
        "accuracy_0": 0.5,
        "accuracy_1": 0.25,
        "kept": 0.75,
    }
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {"step": 1}


def test_resuming_drops_lines_the_checkpoint_does_not_cover(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, evaluations=tmp_path / "evaluations.jsonl")
    log.run_started(0, 10)
    for step in range(1, 6):
        log.window_trained(_result(step))
    with path.open("a") as handle:
        handle.write('{"step": 6, "lo')
    log.run_started(3, 10)
    log.window_trained(_result(4))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert math.isclose(json.loads(lines[-1])["loss"], 0.4)
