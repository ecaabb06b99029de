# SPDX-License-Identifier: Apache-2.0
"""EAGLE3 on a CUDA device gives the CPU's loss and gradients."""

from __future__ import annotations

import pytest
import torch
from specforge_core.contracts import StepContext
from specforge_core.testing.synthetic import SyntheticTarget
from specforge_eagle3.config import Eagle3Config
from specforge_eagle3.strategy import Eagle3Strategy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("loss_type", ["none", "alpha", "lambda"])
def test_cuda_equals_cpu(loss_type):
    target = SyntheticTarget()
    strategy = Eagle3Strategy(Eagle3Config(draft_vocab_size=40, ttt_steps=4, lk_loss_type=loss_type))
    request = strategy.capture_request(target.info)
    samples = [target.sample(f"p{i}", num_tokens=n, request=request) for i, n in enumerate((30, 17, 24))]
    losses, grads = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        draft = strategy.build_draft(target).to(device)
        batch = strategy.collate(samples, range(3)).to(device)
        context = StepContext(0, 1, batch.denominators)
        if strategy.measures:
            with torch.no_grad():
                context = StepContext(0, 1, batch.denominators, strategy.measure(draft, batch, context))
        (term,) = strategy.loss(draft, batch, context).terms
        (term.numerator / batch.denominators[term.denominator]).backward()
        losses.append(term.numerator.item())
        grads.append({name: p.grad.cpu() for name, p in draft.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, expected in grads[0].items():
        assert (grads[1][name] - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, name
