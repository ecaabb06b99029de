# SPDX-License-Identifier: Apache-2.0
"""Small drafts, samples and steps for the tests of DFlash and Domino."""

from __future__ import annotations

import torch
from specforge_core.contracts import StepContext
from specforge_core.testing.synthetic import SyntheticTarget
from specforge_dflash.config import DflashConfig
from specforge_dflash.strategy import DflashStrategy
from specforge_domino.config import DominoConfig
from specforge_domino.strategy import DominoStrategy

TARGET = SyntheticTarget()
SMALL = {"block_size": 5, "num_anchors": 6, "num_layers": 2}
HEAD = {"emb_dim": 8, "gru_hidden_dim": 12}
LENGTHS = (9, 24, 16, 31)


def make_strategy(name, settings):
    if name == "dflash":
        return DflashStrategy(DflashConfig(**{**SMALL, **settings}))
    return DominoStrategy(DominoConfig(**{**SMALL, **HEAD, **settings}))


def make_draft(strategy, *, scale=6.0, seed=0):
    """Weights large enough for every input to matter."""
    torch.manual_seed(seed)
    draft = strategy.build_draft(TARGET)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if name.startswith("embed_proj"):
                parameter.mul_(4)
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return draft


def make_samples(strategy, lengths=LENGTHS):
    """Samples whose loss mask has holes, so that blocks cross them."""
    request, samples = strategy.capture_request(TARGET.info), []
    for number, length in enumerate(lengths):
        sample = TARGET.sample(f"s{number}", num_tokens=length, request=request)
        mask = sample.features["loss_mask"]
        mask[length // 4 :] = True
        mask[length // 2 + 1] = False
        samples.append(sample)
    return samples


def run_batches(strategy, draft, batches, *, step=3):
    """Loss over a window of micro-batches and every gradient, as the trainer computes them."""
    denominators = {}
    for batch in batches:
        for name, value in batch.denominators.items():
            denominators[name] = denominators.get(name, 0.0) + value
    context = StepContext(step=step, total_steps=10, denominators=denominators)
    draft.zero_grad()
    total, outputs = 0.0, []
    for batch in batches:
        output = strategy.loss(draft, batch, context)
        loss = sum(t.weight * t.numerator / denominators[t.denominator] for t in output.terms)
        if torch.is_grad_enabled():
            loss.backward()
        total += float(loss.detach())
        outputs.append(output)
    grads = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    return total, grads, outputs


def assert_close(grads, expected, *, limit=2e-4):
    assert grads.keys() == expected.keys()
    for name, value in expected.items():
        error = (grads[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error.item() < limit, f"{name}: {error.item():.1e}"
