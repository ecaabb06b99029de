# SPDX-License-Identifier: Apache-2.0
"""Attention of packed blocks: each slot over its block and over what it sees of its sample's context.

On CPU the two kinds of keys go through fused attention apart, and a log-sum-exp merge joins them: with
P = exp(s − lse) and δ = Σ dO·O over the merged values, the fused backward of each part is exact. No score outlives its
segment. On CUDA it is one FlexAttention. ``attend_plain`` is the formula written out: for what neither takes, and to
compare.

Legend: R query rows, C packed context, M blocks, K block size, N query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from specforge_core.modeling import Attended, fused_attention, fused_attention_backward, per_query_head
from torch import Tensor

from specforge_dflash.block_mask import BlockLayout

_FLEX_LEAST_HEAD = 16
"""Head sizes below it are not compiled by FlexAttention."""


@dataclass(frozen=True, slots=True)
class BlockKeys:
    """Keys and values: of the blocks' own slots [R, G, D] and of the context [C, G, D]."""

    own_key: Tensor
    own_value: Tensor
    key: Tensor
    value: Tensor


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """[R, N, ...] → [M, N, K, ...]."""
    return x.reshape(-1, block_size, *x.shape[1:]).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[M, N, K, ...] → [R, N, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _heads(x: Tensor) -> Tensor:
    """[J, N, ...] → [1, N, J, ...]."""
    return x.transpose(0, 1).unsqueeze(0)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: BlockLayout, window: int | None, query: Tensor, *given: Tensor) -> Tensor:
        own_key, own_value, key, value = given
        own = (_blocks(x, layout.block_size) for x in (query, own_key, own_value))
        out, lse = (_rows(x) for x in fused_attention(*own, causal=window is not None))
        for part in layout.segments(window):
            operands = (_heads(x) for x in (query[part.rows], key[part.keys], value[part.keys]))
            o, l = fused_attention(*operands, mask=part.mask)
            o, l = o[0].transpose(0, 1), l[0].transpose(0, 1)
            both = torch.logaddexp(lse[part.rows], l)
            own_share, share = (lse[part.rows] - both).exp(), (l - both).exp()
            out[part.rows] = out[part.rows] * own_share.unsqueeze(-1).to(o) + o * share.unsqueeze(-1).to(o)
            lse[part.rows] = both
        ctx.layout, ctx.window = layout, window
        ctx.save_for_backward(query, *given, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, *given, out, lse = ctx.saved_tensors
        layout: BlockLayout = ctx.layout
        grad, window, size = grads[0].contiguous(), ctx.window, layout.block_size
        own_key, own_value, key, value = given
        attended = Attended(*(_blocks(x, size) for x in (query, own_key, own_value, out, lse)))
        own = fused_attention_backward(_blocks(grad, size), attended, causal=window is not None)
        grad_query, grad_own_key, grad_own_value = (_rows(x) for x in own)
        grad_query = grad_query.contiguous()
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for part in layout.segments(window):
            rows, keys = part.rows, part.keys
            attended = Attended(*(_heads(x) for x in (query[rows], key[keys], value[keys], out[rows], lse[rows])))
            pieces = fused_attention_backward(_heads(grad[rows]), attended, mask=part.mask)
            for total, piece in (
                (grad_query[rows], pieces[0]),
                (grad_key[keys], pieces[1]),
                (grad_value[keys], pieces[2]),
            ):
                total += piece[0].transpose(0, 1)
        return None, None, grad_query, grad_own_key, grad_own_value, grad_key, grad_value


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def attend_flex(
    layout: BlockLayout,
    query: Tensor,
    keys: BlockKeys,
    *,
    window: int | None,
    flex: Callable[..., Tensor] | None = None,
) -> Tensor:
    """:func:`attend_blocks` through FlexAttention.

    :param flex: the kernel; default: compiled.
    """
    key = torch.cat([keys.own_key, keys.key])
    value = torch.cat([keys.own_value, keys.value])
    kernel = flex or _compiled_flex()
    grouped = query.shape[1] != key.shape[1]
    out = kernel(_heads(query), _heads(key), _heads(value), block_mask=layout.flex(window), enable_gqa=grouped)
    return out[0].transpose(0, 1)


def attend_plain(layout: BlockLayout, query: Tensor, keys: BlockKeys, *, window: int | None) -> Tensor:
    """:func:`attend_blocks` as it is written in formulas: every score exists."""
    groups = query.shape[1] // keys.own_key.shape[1]
    key = per_query_head(torch.cat([keys.own_key, keys.key]), groups)
    value = per_query_head(torch.cat([keys.own_value, keys.value]), groups)
    scores = torch.einsum("rnd,jnd->nrj", query, key).float() * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~layout.dense(window), float("-inf")).softmax(-1).to(value.dtype)
    return torch.einsum("nrj,jnd->rnd", weights, value)


def attend_blocks(layout: BlockLayout, query: Tensor, keys: BlockKeys, *, window: int | None) -> Tensor:
    """``softmax(q·K/√D)`` over what each slot sees, times the values.

    :param query: [R, N, D], N a multiple of G.
    :param window: of a sliding layer; None: everything before the anchor.
    :returns: [R, N, D].
    """
    if query.device.type == "cpu":
        parts = (keys.own_key, keys.own_value, keys.key, keys.value)
        result: Tensor = _BlockAttention.apply(layout, window, query, *parts)  # type: ignore[no-untyped-call]
        return result
    if query.device.type == "cuda" and query.shape[-1] >= _FLEX_LEAST_HEAD:
        return attend_flex(layout, query, keys, window=window)
    return attend_plain(layout, query, keys, window=window)
