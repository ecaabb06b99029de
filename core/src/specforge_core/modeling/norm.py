# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation, as Llama-like models define it, with a backward pass of its own.

Written out because torch composes it of half a dozen element-wise operations on CPU, each a pass over memory with a
saved intermediate; here one factor per row is all that is kept. Used by draft models and by the frozen target head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        # A row's factor 1/rms: the only statistic, kept in fp32.
        scale = torch.linalg.vecdot(x32, x32).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = (x32 * scale).to(x.dtype).mul_(weight)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].float()
        unit = x.float() * scale
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * weight.float()
            mean = torch.linalg.vecdot(inner, unit).div_(x.shape[-1]).unsqueeze(-1)
            grad_x = inner.sub_(unit.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x·rsqrt(mean x² + eps)`` in fp32, cast back to x's dtype, times ``weight``.

    :param x: [..., H], any float dtype.
    :param weight: [H], of x's dtype.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class RMSNorm(nn.Module):
    """:func:`rms_norm` with its weight, which starts as ones."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
