# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation, as Llama-like models define it, with a backward pass of its own.

Written out because torch composes it of half a dozen element-wise operations on CPU, each a pass over memory with a
saved intermediate; here one factor per row is all that is kept. Used by draft models and by the frozen target head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """A row's factor 1/rms, fp32 [..., 1]: the only statistic."""
    x32 = x.float()
    square: Tensor = torch.linalg.vecdot(x32, x32)
    return square.div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def norm_forward(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The normed x, from its row factors."""
    return (x.float() * scale).to(x.dtype).mul_(weight)


def norm_backward(
    grad: Tensor, saved: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, where wanted."""
    x, weight, scale = saved
    grad32, unit = grad.float(), x.float() * scale
    grad_weight = (grad32 * unit).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype) if wanted[1] else None
    if not wanted[0]:
        return None, grad_weight
    inner = grad32 * weight.float()
    mean = torch.linalg.vecdot(inner, unit).div_(x.shape[-1]).unsqueeze(-1)
    return inner.sub_(unit.mul_(mean)).mul_(scale).to(x.dtype), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = norm_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return norm_forward(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *norm_backward(grads[0], ctx.saved_tensors, ctx.needs_input_grad[:2]), None


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, matrix: Tensor) -> Tensor:
        scale = norm_scale(x, eps)
        ctx.save_for_backward(x, weight, scale, matrix)
        return norm_forward(x, weight, scale) @ matrix.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, matrix = ctx.saved_tensors
        grad_matrix = grads[0].T @ norm_forward(x, weight, scale) if ctx.needs_input_grad[3] else None
        grad_x, grad_weight = norm_backward(grads[0] @ matrix, (x, weight, scale), ctx.needs_input_grad[:2])
        return grad_x, grad_weight, None, grad_matrix


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x·rsqrt(mean x² + eps)`` in fp32, cast back to x's dtype, times ``weight``.

    :param x: [..., H], any float dtype.
    :param weight: [H], of x's dtype.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


def rms_norm_linear(x: Tensor, norm: RMSNorm, matrix: Tensor) -> Tensor:
    """A linear map of the normed x: [R, H] and [O, H] → [R, O]. The normed x is recomputed in backward, not kept."""
    result: Tensor = _RMSNormLinear.apply(x, norm.weight, norm.eps, matrix)  # type: ignore[no-untyped-call]
    return result


class RMSNorm(nn.Module):
    """:func:`rms_norm` with its weight, which starts as ones."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
