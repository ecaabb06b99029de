# SPDX-License-Identifier: Apache-2.0
"""The block mask's three forms say the same, and fused attention equals the formula, gradients included."""

from __future__ import annotations

import pytest
import torch
from specforge_dflash.block_attention import BlockKeys, attend_blocks, attend_flex, attend_plain
from specforge_dflash.block_mask import BlockLayout

WINDOWS = [None, 1, 3, 6, 100]


def make_layout(block_size=4):
    anchors, samples = torch.tensor([0, 2, 9, 3, 3, 8, 0]), torch.tensor([0, 0, 0, 1, 1, 1, 3])
    lengths = {0: 9, 1: 8}
    sample_C = torch.cat([torch.full((n,), s) for s, n in lengths.items()])
    position_C = torch.cat([torch.arange(n) for n in lengths.values()])
    return BlockLayout(block_size, anchors, samples, sample_C, position_C)


def make_inputs(layout, *, heads=4, key_heads=2, dtype=torch.float32):
    torch.manual_seed(0)

    def draw(rows, count):
        return torch.randn(rows, count, 8, dtype=dtype, requires_grad=True)

    own = (draw(layout.num_rows, key_heads), draw(layout.num_rows, key_heads))
    context = (draw(layout.num_context, key_heads), draw(layout.num_context, key_heads))
    return draw(layout.num_rows, heads), BlockKeys(*own, *context)


def expected_visibility(layout, window):
    size, rows = layout.block_size, []
    for block in range(len(layout.anchors_M)):
        for slot in range(size):
            anchor, sample = int(layout.anchors_M[block]), int(layout.sample_M[block])
            row = []
            for other in range(layout.num_rows):
                row.append(other // size == block and (window is None or other % size <= slot))
            for s, j in zip(layout.sample_C.tolist(), layout.position_C.tolist(), strict=True):
                near = window is None or j >= anchor + slot - (window - 1)
                row.append(s == sample and j < anchor and near)
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_rule_is_as_written(window):
    layout = make_layout()
    assert torch.equal(layout.dense(window), expected_visibility(layout, window))


@pytest.mark.parametrize("window", WINDOWS)
def test_segments_cover_exactly_the_visible_context(window, monkeypatch):
    monkeypatch.setattr("specforge_dflash.block_mask._SEGMENT_ROWS", 8)
    layout = make_layout()
    covered = torch.zeros(layout.num_rows, layout.num_context, dtype=torch.bool)
    for part in layout.segments(window):
        assert part.mask.shape[2:] == covered[part.rows, part.keys].shape
        assert not covered[part.rows, part.keys].any()
        covered[part.rows, part.keys] = part.mask[0, 0] == 0
    assert torch.equal(covered, layout.dense(window)[:, layout.num_rows :])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
def test_fused_attention_is_the_formula(window, heads):
    layout = make_layout()
    query, keys = make_inputs(layout, heads=heads[0], key_heads=heads[1])
    parts = [query, keys.own_key, keys.own_value, keys.key, keys.value]
    direction = torch.randn(layout.num_rows, heads[0], 8)
    results = []
    for attend in (attend_blocks, attend_plain):
        out = attend(layout, query, keys, window=window)
        results.append([out, *torch.autograd.grad((out * direction).sum(), parts)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_takes_the_same_rule(window):
    from torch.nn.attention.flex_attention import flex_attention

    layout = make_layout()
    with torch.no_grad():
        query, keys = make_inputs(layout)
        detached = BlockKeys(*(x.detach() for x in (keys.own_key, keys.own_value, keys.key, keys.value)))
        found = attend_flex(layout, query.detach(), detached, window=window, flex=flex_attention)
        expected = attend_plain(layout, query, keys, window=window)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_attention_without_any_context():
    layout = BlockLayout(3, torch.tensor([0, 0]), torch.tensor([0, 1]), *(torch.empty(0, dtype=torch.int64),) * 2)
    query, keys = make_inputs(layout)
    out = attend_blocks(layout, query, keys, window=None)
    torch.testing.assert_close(out, attend_plain(layout, query, keys, window=None))
    out.sum().backward()
    assert keys.key.grad.shape == (0, 2, 8)


def test_attention_in_bfloat16():
    layout = make_layout()
    query, keys = make_inputs(layout, dtype=torch.bfloat16)
    out = attend_blocks(layout, query, keys, window=3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attend_plain(layout, query, keys, window=3), atol=3e-2, rtol=3e-2)
    out.sum().backward()
    assert keys.key.grad.dtype == torch.bfloat16
