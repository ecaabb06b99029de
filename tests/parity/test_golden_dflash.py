# SPDX-License-Identifier: Apache-2.0
"""The stored vectors of both families pass, and so do other settings against formulas written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dflash_cases import assert_close, make_draft, make_samples, make_strategy, run_batches
from dflash_formulas import dflash_loss, domino_loss
from specforge_core.contracts import Ratio
from specforge_core.testing.golden import run_vector

VECTORS = sorted((Path(__file__).parent / "golden").glob("d*.safetensors"))
SLIDING = {"sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}

DFLASH = [
    {},
    {"loss_decay_gamma": 7.0},
    {"loss_decay_gamma": 2.0, "block_size": 16, "num_anchors": 3},
    {"loss_type": "dpace"},
    {"loss_type": "dpace", "dpace_alpha": 0.0, "loss_decay_gamma": 3.0},
    {"loss_type": "dpace-cumulative-confidence-only", "dpace_alpha": 0.3},
    {"loss_type": "dpace-continuation-value-only", **SLIDING},
    {"num_layers": 1, "block_size": 2},
    {"num_layers": 1, **SLIDING},
    {**MIXED, "num_key_value_heads": 4},
    {"sliding_window": 1},
    {"aux_layer_ids": [3, 0, 11], "mask_token_id": 5, "num_anchors": 1},
]
DOMINO = [
    {},
    {"loss_decay_gamma": 7.0},
    {"shift_label": False},
    {"shift_label": False, "loss_decay_gamma": 2.0, "pure_draft_prefix_len": 0},
    {"pure_draft_prefix_len": 0, **SLIDING},
    {"pure_draft_prefix_len": 3, "lambda_base_start": 0.4},
    {"pure_draft_prefix_len": 9, "num_layers": 1},
    {"shift_label": False, "lambda_base_start": 0.0, **MIXED},
]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_stored_vectors_pass(path):
    failed = [row for row in run_vector(path) if not row.passed]
    assert not failed


def test_there_are_vectors_of_both_families():
    assert {path.stem.split("_")[0] for path in VECTORS} == {"dflash", "domino"}


def compare(strategy, formula):
    draft = make_draft(strategy)
    batch = strategy.collate(make_samples(strategy), [11, 12, 13, 14])
    loss, grads, outputs = run_batches(strategy, draft, [batch])
    draft.zero_grad()
    expected = formula(draft, batch.tensors)
    value, accuracy = expected if isinstance(expected, tuple) else (expected, None)
    value.backward()
    expected_grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in draft.named_parameters()}
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)
    assert_close(grads, expected_grads)
    found: Ratio = outputs[0].metrics["accuracy"]
    if accuracy is not None:
        assert found.value == pytest.approx(accuracy)


@pytest.mark.parametrize("settings", DFLASH, ids=str)
def test_dflash_is_its_formulas(settings):
    strategy = make_strategy("dflash", settings)
    compare(strategy, lambda draft, tensors: dflash_loss(draft, tensors, strategy.config))


@pytest.mark.parametrize("settings", DOMINO, ids=str)
def test_domino_is_its_formulas(settings):
    strategy = make_strategy("domino", settings)
    share = strategy.config.lambda_base_start * (1 - 3 / 5)
    compare(strategy, lambda draft, tensors: domino_loss(draft, tensors, strategy.config, share))
