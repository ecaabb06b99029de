# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward of Llama-like models (SwiGLU, arXiv 2002.05202), keeping half of what autograd would keep.

Only the joined gate and up products are saved; the gated product, which the down projection needs in backward, is
recomputed there in one pass. An unrolled draft holds these once per step, so they are most of its memory.

Legend: R rows, H hidden, F intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up) @ down.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate_up, down = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = functional.silu(gate)
        grad_down = grads[0].T @ (activated * up) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_down
        grad = grads[0] @ down
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
        return grad_gate_up, grad_down


def gated_down(gate_up_RF: Tensor, down_HF: Tensor) -> Tensor:
    """``down · (silu(gate) · up)``.

    :param gate_up_RF: [R, 2F], gate then up.
    :param down_HF: [H, F].
    """
    result: Tensor = _GatedDown.apply(gate_up_RF, down_HF)  # type: ignore[no-untyped-call]
    return result
