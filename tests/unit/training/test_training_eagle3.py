# SPDX-License-Identifier: Apache-2.0
"""Whole EAGLE3 runs through the trainer: cutting a window, bf16, resuming."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from specforge_core.contracts import Sample, StopSignal
from specforge_core.testing.synthetic import SyntheticTarget
from specforge_core.training.evaluator import Evaluation
from specforge_core.training.window_step import WindowResult
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy
from torch import nn
from toy_run import ToyRun, largest_difference, same_bits

_TARGET = SyntheticTarget()


def _sample(strategy: Eagle3Strategy, index: int, epoch: int) -> Sample:
    request = strategy.capture_request(_TARGET.info)
    tokens = 5 + index * 7 % 11
    sample = _TARGET.sample(f"p{index}", num_tokens=tokens, request=request, trained=index % 5 != 4)
    return replace(sample, epoch=epoch)


def _draft(strategy: Eagle3Strategy) -> nn.Module:
    torch.manual_seed(0)
    return strategy.build_draft(_TARGET)


def _run(directory: Path, *, settings: dict[str, Any], **changes: Any) -> ToyRun:
    strategy = Eagle3Strategy(Eagle3Config(draft_vocab_size=40, ttt_steps=3, **settings))
    return ToyRun(
        directory=directory,
        strategy=strategy,
        build_draft=partial(_draft, strategy),
        make_sample=partial(_sample, strategy),
        **{"epochs": 2, "learning_rate": 1e-4, **changes},
    )


@pytest.mark.parametrize("lk_loss_type", ["none", "alpha", "lambda"])
def test_cutting_a_window_does_not_change_the_step(tmp_path: Path, lk_loss_type: str) -> None:
    """At EAGLE3's own learning rate: where a gradient is nearly zero, AdamW turns its rounding into a share of it."""
    weights = {
        size: _run(tmp_path / str(size), settings={"lk_loss_type": lk_loss_type}, micro_batch_size=size).weights()
        for size in (4, 2, 1)
    }
    assert largest_difference(weights[4], weights[2]) < 1e-6
    assert largest_difference(weights[4], weights[1]) < 1e-6


class _StopAfter:
    """An observer that asks the run to stop after a step."""

    def __init__(self, stop: StopSignal, step: int) -> None:
        self._stop = stop
        self._step = step

    def window_trained(self, result: WindowResult) -> None:
        if result.step == self._step:
            self._stop.request("test")

    def run_started(self, step: int, total_steps: int) -> None: ...

    def evaluated(self, step: int, evaluation: Evaluation) -> None: ...

    def checkpoint_saved(self, step: int, path: Path) -> None: ...

    def run_finished(self, outcome: str) -> None: ...


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stopped_at_any_step_and_resumed_it_ends_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = _run(tmp_path / "whole", settings={}, dtype=dtype).weights()
    for step in (1, 4, 6):
        stop = StopSignal()
        directory = tmp_path / f"stopped{step}"
        stopped = _run(directory, settings={}, dtype=dtype, stop=stop, observers=(_StopAfter(stop, step),))
        assert stopped.trainer().fit() == "stopped"
        assert same_bits(whole, _run(directory, settings={}, dtype=dtype).weights())
