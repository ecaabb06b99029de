# SPDX-License-Identifier: Apache-2.0
"""The fused kernels of CUDA are called as this torch wants them called, seen without a device; tests/gpu runs them."""

from __future__ import annotations

import pytest
import torch
from specforge_core.modeling import Attended, fused_attention, fused_attention_backward
from torch._subclasses.fake_tensor import FakeTensorMode

QUERIES, KEYS = 160, 200


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cuda_kernels_take_what_they_are_given(dtype: torch.dtype, masked: bool) -> None:
    with FakeTensorMode(), torch.no_grad():
        mask = torch.zeros(2, 1, QUERIES, KEYS, device="cuda") if masked else None
        query = torch.randn(2, 6, QUERIES, 64, device="cuda", dtype=dtype)
        key, value = (torch.randn(2, 3, KEYS, 64, device="cuda", dtype=dtype) for _ in range(2))
        out, lse = fused_attention(query, key, value, mask=mask)
        attended = Attended(query, key, value, out, lse)
        grads = fused_attention_backward(torch.ones_like(out), attended, mask=mask)
        assert (out.shape, out.dtype) == (query.shape, dtype)
        assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]
