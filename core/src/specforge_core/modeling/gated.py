# SPDX-License-Identifier: Apache-2.0
"""The normed, gated feed-forward of Llama-like models (SwiGLU, arXiv 2002.05202), keeping only its input.

An unrolled draft would hold the gate and up products of every step until backward, most of its memory. They are
recomputed there instead, for one more product out of nine.

Legend: R rows, H hidden, F intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specforge_core.modeling.norm import RMSNorm, norm_backward, norm_forward, norm_scale


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gate_up: Tensor, down: Tensor) -> Tensor:
        scale = norm_scale(x, eps)
        ctx.save_for_backward(x, weight, scale, gate_up, down)
        gate, up = (norm_forward(x, weight, scale) @ gate_up.T).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up) @ down.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, gate_up, down = ctx.saved_tensors
        normed = norm_forward(x, weight, scale)
        products = normed @ gate_up.T
        gate, up = products.chunk(2, dim=-1)
        activated = functional.silu(gate)
        grad_down = grads[0].T @ (activated * up)
        grad = grads[0] @ down
        grad_up = activated.mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad.mul_(up), gate)
        grad_products = torch.cat([grad_gate, grad_up], dim=-1, out=products)
        grad_gate_up = grad_products.T @ normed
        grad_x, grad_weight = norm_backward(grad_products @ gate_up, (x, weight, scale), ctx.needs_input_grad[:2])
        return grad_x, grad_weight, None, grad_gate_up, grad_down


def gated_mlp(x_RH: Tensor, norm: RMSNorm, *, gate_up_FH: Tensor, down_HF: Tensor) -> Tensor:
    """``down · (silu(gate · n) · (up · n))`` with ``n`` the normed x.

    :param x_RH: [R, H].
    :param gate_up_FH: [2F, H], gate above up.
    :param down_HF: [H, F].
    """
    result: Tensor = _GatedMlp.apply(x_RH, norm.weight, norm.eps, gate_up_FH, down_HF)  # type: ignore[no-untyped-call]
    return result
