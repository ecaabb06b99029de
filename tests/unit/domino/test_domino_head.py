# SPDX-License-Identifier: Apache-2.0
"""Domino's own parts: the GRU, the decay of the uncorrected loss, and how the two losses are joined."""

from __future__ import annotations

import pytest
import torch
from dflash_cases import assert_close, make_draft, make_samples, make_strategy, run_batches
from specforge_domino.base_loss_decay import base_loss_weight
from specforge_domino.causal_head import PrefixGru


def test_the_gru_is_torchs():
    torch.manual_seed(0)
    own, reference = PrefixGru(6, 9), torch.nn.GRU(6, 9, bias=False, batch_first=True)
    assert dict(own.named_parameters()).keys() == dict(reference.named_parameters()).keys()
    reference.load_state_dict(own.state_dict())
    tokens = torch.randn(3, 7, 6)
    expected, _ = reference(tokens)
    state = own.start(3)
    for step in range(7):
        state = own.step(own.read(tokens[:, step]), state)
        torch.testing.assert_close(state, expected[:, step])


@pytest.mark.parametrize(
    ("step", "total", "start", "ratio", "weight"),
    [
        (0, 100, 1.0, 0.5, 1.0),
        (25, 100, 1.0, 0.5, 0.5),
        (50, 100, 1.0, 0.5, 0.0),
        (99, 100, 1.0, 0.5, 0.0),
        (10, 100, 0.3, 1.0, 0.27),
        (1, 3, 1.0, 0.5, 0.0),  # int(1.5) steps
        (0, 1, 1.0, 0.0, 1.0),
        (1, 1, 1.0, 0.0, 0.0),
        (0, 10, 1.7, 0.5, 1.0),
        (0, 10, -1.0, 0.5, 0.0),
    ],
)
def test_the_uncorrected_loss_fades(step, total, start, ratio, weight):
    assert base_loss_weight(step, total, start=start, decay_ratio=ratio) == pytest.approx(weight)


def ratio(output, name):
    return output.metrics[name].value


@pytest.mark.parametrize("step", [0, 2, 5, 9])
def test_loss_is_the_balance_of_both(step):
    strategy = make_strategy("domino", {"loss_decay_gamma": 3.0})
    draft, batch = make_draft(strategy), strategy.collate(make_samples(strategy), range(4))
    loss, grads, (output,) = run_batches(strategy, draft, [batch], step=step)
    share = max(1 - step / 5, 0)
    expected = (1 - share) * ratio(output, "final_loss") + share * ratio(output, "base_loss")
    assert loss == pytest.approx(expected, rel=1e-6)
    head = [name for name in grads if name.startswith(("embed_proj", "prefix_gru"))]
    assert len(head) == 4
    for name in head:
        assert bool(grads[name].any()) == (share < 1), name


def test_without_correction_it_is_dflash():
    uncorrected = make_strategy("domino", {"shift_label": False, "pure_draft_prefix_len": 99})
    dflash = make_strategy("dflash", {})
    draft, plain = make_draft(uncorrected), make_draft(dflash)
    plain.load_state_dict({k: v for k, v in draft.state_dict().items() if k in plain.state_dict()})
    seeds = [1, 2, 3, 4]
    found, grads, (output,) = run_batches(uncorrected, draft, [uncorrected.collate(make_samples(uncorrected), seeds)])
    expected, expected_grads, _ = run_batches(dflash, plain, [dflash.collate(make_samples(dflash), seeds)])
    assert found == pytest.approx(expected, rel=1e-6)
    assert ratio(output, "final_loss") == pytest.approx(ratio(output, "base_loss"))
    assert_close({name: grads[name] for name in expected_grads}, expected_grads, limit=1e-5)
