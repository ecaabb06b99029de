# SPDX-License-Identifier: Apache-2.0
"""torch's fused attention kernels, with the log of their softmax's denominator, forward and backward as two functions.

A caller that merges several attentions needs that log-sum-exp, and needs to hand the *merged* output and log-sum-exp to
the backward kernel, which autograd over ``scaled_dot_product_attention`` does not allow. One pair of functions hides
which kernel a device and dtype have: on CPU the flash kernel; on CUDA flash for bf16 and fp16, and the
memory-efficient one for fp32 and for masks. No kernel ever holds a score matrix in memory.

Legend: B samples, Q queries, T keys, N query heads, G key heads (N a multiple of G), D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ATEN = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
_CUDA_HEAD_MULTIPLE, _CUDA_HEAD_LIMIT = 8, 256  # what the flash kernel takes
_LSE_MULTIPLE, _MASK_MULTIPLE = 32, 8  # how the memory-efficient kernel wants rows of its lse and mask to end


def has_fused_kernel(query: Tensor) -> bool:
    """Whether this device, dtype and head size have a kernel here."""
    if query.device.type == "cpu":
        return True
    size = query.shape[-1]
    return query.device.type == "cuda" and size % _CUDA_HEAD_MULTIPLE == 0 and size <= _CUDA_HEAD_LIMIT


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(q·K / √D)·V`` and the log of the softmax's denominator.

    :param query: [B, N, Q, D]; key and value [B, G, T, D].
    :param causal: query i sees keys 0 … i; Q equals T then.
    :param mask: additive, [B or 1, 1, Q, T].
    :returns: [B, N, Q, D] and fp32 [B, N, Q].
    """
    if _is_flash(query, mask):
        flash = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
        return flash[0], flash[1]
    groups = query.shape[1] // key.shape[1]
    key, value = per_query_head(key, groups), per_query_head(value, groups)
    if query.device.type == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=mask)
        return out, lse
    efficient = _ATEN._scaled_dot_product_efficient_attention(query, key, value, _bias(mask, query), True, 0.0, causal)
    return efficient[0], efficient[1].narrow(-1, 0, query.shape[2])


@dataclass(frozen=True, slots=True)
class Attended:
    """What an attention read and said.

    :param out: [B, N, Q, D], and ``lse`` [B, N, Q]: of these keys alone, or merged with those of other attentions.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor


def fused_attention_backward(
    grad: Tensor, attended: Attended, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from ``P = exp(s − lse)`` and ``δ = Σ grad·out``."""
    query, key, value, out, lse = attended.query, attended.key, attended.value, attended.out, attended.lse
    if _is_flash(query, mask):
        # of the dropout that there is none of
        seed, offset = (torch.empty(size, dtype=torch.uint64, device=query.device) for size in (2, 0))
        lengths = query.shape[2], key.shape[2]
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), None, None, *lengths, 0.0, causal, seed, offset
        )
        return dq, dk, dv
    groups = query.shape[1] // key.shape[1]
    key, value = per_query_head(key, groups), per_query_head(value, groups)
    if query.device.type == "cpu":
        dq, dk, dv = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask
        )
    else:
        lse = functional.pad(lse, (0, -lse.shape[-1] % _LSE_MULTIPLE), value=float("inf")).contiguous()
        seed = torch.zeros((), dtype=torch.int64, device=query.device)
        bias = _bias(mask, query)
        dq, dk, dv, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, bias, out, lse, seed, seed, 0.0, [True, True, True, False], causal
        )
    return dq, per_key_head(dk, groups), per_key_head(dv, groups)


def per_query_head(x: Tensor, groups: int) -> Tensor:
    """Repeat key heads (dimension 1) for the query heads that share them."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def per_key_head(grad: Tensor, groups: int) -> Tensor:
    """Sum gradients over the query heads that share a key head (dimension 1)."""
    return grad if groups == 1 else grad.reshape(grad.shape[0], -1, groups, *grad.shape[2:]).sum(2)


def _is_flash(query: Tensor, mask: Tensor | None) -> bool:
    return query.device.type == "cuda" and query.dtype in _HALF and mask is None


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask for every head, in the query's dtype, its rows aligned as the kernel wants them."""
    if mask is None:
        return None
    length = mask.shape[-1]
    rows = functional.pad(mask.to(query.dtype), (0, -length % _MASK_MULTIPLE))
    return rows.narrow(-1, 0, length).expand(query.shape[0], query.shape[1], -1, -1)
