# SPDX-License-Identifier: Apache-2.0
"""DFlash and Domino on a CUDA device (FlexAttention, compiled) give the CPU's loss and gradients."""

from __future__ import annotations

import pytest
import torch
from dflash_cases import TARGET, make_draft, make_samples, make_strategy, run_batches
from specforge_dflash.block_attention import BlockKeys, attend_flex, attend_plain
from specforge_dflash.block_mask import BlockLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}


def close_enough(found, expected, name):
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max() + 1e-6, name


@pytest.mark.parametrize("name", ["dflash", "domino"])
@pytest.mark.parametrize("settings", [{}, MIXED], ids=["full", "mixed"])
def test_cuda_equals_cpu(name, settings):
    torch.backends.cuda.matmul.allow_tf32 = False
    # Heads of 16: the compiled kernel takes no smaller ones.
    strategy = make_strategy(name, {**settings, "num_attention_heads": 2, "num_key_value_heads": 1, "block_size": 16})
    batch = strategy.collate(make_samples(strategy), range(4))
    results = []
    for device in ("cpu", "cuda"):
        draft = make_draft(strategy, scale=3.0).to(device)
        loss, grads, _ = run_batches(strategy, draft, [batch.to(device)])
        results.append((loss, {key: grad.cpu() for key, grad in grads.items()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    for key, expected in results[0][1].items():
        close_enough(results[1][1][key], expected, key)


@pytest.mark.parametrize("window", [None, 9])
def test_flex_attention_is_the_formula_gradients_included(window):
    torch.manual_seed(0)
    anchors, samples = torch.tensor([0, 17, 150, 3, 99]), torch.tensor([0, 0, 0, 1, 1])
    sample_C = torch.cat([torch.zeros(150, dtype=torch.int64), torch.ones(99, dtype=torch.int64)])
    position_C = torch.cat([torch.arange(150), torch.arange(99)])
    layout = BlockLayout(16, *(x.cuda() for x in (anchors, samples, sample_C, position_C)))

    def draw(rows, heads):
        return torch.randn(rows, heads, 32, device="cuda", requires_grad=True)

    rows, context = layout.num_rows, layout.num_context
    query, keys = draw(rows, 4), BlockKeys(draw(rows, 2), draw(rows, 2), draw(context, 2), draw(context, 2))
    parts = [query, keys.own_key, keys.own_value, keys.key, keys.value]
    direction = torch.randn(rows, 4, 32, device="cuda")
    results = []
    for attend in (attend_flex, attend_plain):
        out = attend(layout, query, keys, window=window)
        results.append([out, *torch.autograd.grad((out * direction).sum(), parts)])
    for place, (found, expected) in enumerate(zip(*results, strict=True)):
        close_enough(found, expected, f"tensor {place}")


@torch.no_grad()
def test_drafting_on_cuda_says_what_cpu_says():
    for name in ("dflash", "domino"):
        strategy = make_strategy(name, {"sliding_window": 6})
        request = strategy.capture_request(TARGET.info)
        sample = TARGET.sample("decode", num_tokens=14, request=request)
        guesses = []
        for device in ("cpu", "cuda"):
            drafter = strategy.drafter(make_draft(strategy).to(device), TARGET)
            features = {"aux_hidden_states": sample.features["aux_hidden_states"][:9]}
            drafter.extend(sample.features["input_ids"][:10], features)
            guesses.append(drafter.propose(4).cpu().tolist())
        assert guesses[0] == guesses[1]


def test_windows_of_many_sizes_stay_compiled():
    """Past its limit of recompilations torch falls back to uncompiled attention, which holds every score."""
    strategy = make_strategy("dflash", {**MIXED, "num_attention_heads": 2, "num_key_value_heads": 1, "block_size": 16})
    draft, samples = make_draft(strategy).cuda(), make_samples(strategy, range(20, 400, 37))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for size in range(1, len(samples) + 1):
            batch = strategy.collate(samples[:size], range(size))
            run_batches(strategy, draft, [batch.to("cuda")])
