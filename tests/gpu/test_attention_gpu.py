# SPDX-License-Identifier: Apache-2.0
"""The fused attention of a CUDA device, merged with own-row keys, is the formula: values and gradients."""

from __future__ import annotations

import pytest
import torch
from specforge_core.modeling import QueryLayout, attend, attend_plain, causal_padding_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTH, KEY_HEADS, QUERY_HEADS = 200, 2, 6


def hidden_keys(offset: int) -> torch.Tensor:
    valid = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda")
    valid[:, 5:9] = False
    return causal_padding_mask(valid, offset=offset)


def layouts() -> dict[str, QueryLayout]:
    some = torch.tensor([0, 1, 5, 29, 131, 160, 221, 319], device="cuda")
    return {
        "all": QueryLayout(2, 0, LENGTH),
        "later": QueryLayout(2, 40, LENGTH - 40),
        "last": QueryLayout(2, LENGTH - 1, 1),
        "some": QueryLayout(2, 40, LENGTH - 40, some),
        "mask": QueryLayout(2, 0, LENGTH, None, hidden_keys(0)),
        "mask, some": QueryLayout(2, 40, LENGTH - 40, some, hidden_keys(40)),
    }


def run(attention, layout: QueryLayout, tensors: list[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    query, key, value, *own = leaves
    out = attention(layout, query, key, value, own=list(zip(own[0::2], own[1::2], strict=True)))
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]


@pytest.mark.parametrize("own_keys", [0, 3])
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["all", "later", "last", "some", "mask", "mask, some"])
def test_fused_attention_is_the_formula(name: str, dtype: torch.dtype, head_dim: int, own_keys: int) -> None:
    torch.manual_seed(0)
    layout = layouts()[name]
    rows = layout.batch * layout.length if layout.rows is None else layout.rows.shape[0]
    shapes = [(rows, QUERY_HEADS, head_dim), *[(2, KEY_HEADS, LENGTH, head_dim)] * 2]
    shapes += [(rows, KEY_HEADS, head_dim)] * (2 * own_keys)
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    direction = torch.randn(rows, QUERY_HEADS, head_dim, device="cuda")
    found = run(attend, layout, tensors, direction.to(dtype))
    expected = run(attend_plain, layout, [tensor.double() for tensor in tensors], direction.double())
    allowed = 2e-3 if dtype == torch.float32 else 2e-2
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-9)
        assert error <= allowed, f"tensor {place}: {error:.1e}"


def test_no_score_matrix_is_held() -> None:
    """At 8,192 positions the scores of 8 heads alone would be 1 GiB in bf16."""
    query, key, value = (torch.randn(8192, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    inputs = [query.requires_grad_(), *(x.transpose(0, 1).unsqueeze(0).requires_grad_() for x in (key, value))]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(QueryLayout(1, 0, 8192), *inputs).float().sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20
