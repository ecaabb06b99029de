# SPDX-License-Identifier: Apache-2.0
"""Causal attention whose queries also see a few keys of their own row, fused by a log-sum-exp merge.

An unrolled draft attends to T keys of the first pass, causally, and to k keys that belong to its own row only (one
for each earlier unroll step). The T keys go through a fused kernel, which also returns the log of its softmax's
denominator; the own-row terms are merged into output and denominator afterwards. Backward hands the
*merged* output and denominator to the fused backward: with P = exp(s − lse) and δ = Σ dO·O over the merged values,
what it computes for the T keys is the exact gradient. The T×(T+k) scores never exist.

Legend: B samples, R query rows (packed), Q query rectangle, T keys, N query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_core.modeling.fused_attention import (
    Attended,
    fused_attention,
    fused_attention_backward,
    has_fused_kernel,
    per_key_head,
    per_query_head,
)


@dataclass(frozen=True, slots=True)
class QueryLayout:
    """Where packed query rows stand among the keys.

    Queries of every sample lie in the rectangle of positions ``offset .. offset + length``; keys are ``0 .. T`` with
    ``T = offset + length``.

    :param rows: int64 [R], index of each packed row in the flattened [B, length] rectangle; None where all are there.
    :param mask: additive fp32 [B, 1, length, T], causality included, or None where plain causality is enough
        (no padded key comes before a query that matters).
    """

    batch: int
    offset: int
    length: int
    rows: Tensor | None = None
    mask: Tensor | None = None

    def spread(self, packed: Tensor) -> Tensor:
        """[R, N, D] → [B, N, length, D], zero where no query is."""
        if self.rows is not None:
            full = packed.new_zeros(self.batch * self.length, *packed.shape[1:])
            packed = full.index_copy_(0, self.rows, packed)
        return packed.view(self.batch, self.length, *packed.shape[1:]).transpose(1, 2)

    def gather(self, spread: Tensor) -> Tensor:
        """[B, N, length, ...] → [R, N, ...]."""
        flat = spread.transpose(1, 2).flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]


def _parts(layout: QueryLayout, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """Key ranges and whether each is causal: all keys before the first query, then the causal square."""
    if layout.mask is not None:
        return [(key, value, False)]
    square = (key[:, :, layout.offset :], value[:, :, layout.offset :], True)
    if layout.offset == 0:
        return [square]
    return [(key[:, :, : layout.offset], value[:, :, : layout.offset], False), square]


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: QueryLayout, query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        q_BNQD = layout.spread(query)
        out, lse = None, None
        for part_key, part_value, causal in _parts(layout, key, value):
            o, l = fused_attention(q_BNQD, part_key, part_value, causal=causal, mask=layout.mask)
            if out is None or lse is None:
                out, lse = o, l
                continue
            both = torch.logaddexp(lse, l)
            out = out * (lse - both).exp().unsqueeze(-1).to(o) + o * (l - both).exp().unsqueeze(-1).to(o)
            lse = both
        assert out is not None
        assert lse is not None
        out_RND, lse_RN = layout.gather(out), layout.gather(lse.unsqueeze(-1)).squeeze(-1)
        if own:
            out_RND, lse_RN = _merge_own(query, out_RND, lse_RN, own)
        ctx.layout = layout
        ctx.save_for_backward(query, key, value, out_RND, lse_RN, *own)
        return out_RND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *own = ctx.saved_tensors
        layout: QueryLayout = ctx.layout
        grad_out = grads[0].contiguous()
        spread_grad, spread_query, spread_out = (layout.spread(x) for x in (grad_out, query, out))
        lse_BNQ = layout.spread(lse.unsqueeze(-1)).squeeze(-1)
        if layout.rows is not None:  # rows without a query must contribute exp(-inf) = 0, not exp(score − 0)
            absent = torch.ones(layout.batch * layout.length, dtype=torch.bool, device=lse.device)
            absent[layout.rows] = False
            absent_BNQ = absent.view(layout.batch, 1, layout.length)
            lse_BNQ = lse_BNQ.masked_fill(absent_BNQ, 1e30)
        grad_query: Tensor | None = None
        pieces: list[tuple[Tensor, Tensor]] = []
        for part_key, part_value, causal in _parts(layout, key, value):
            attended = Attended(spread_query, part_key, part_value, spread_out, lse_BNQ)
            dq, dk, dv = fused_attention_backward(spread_grad, attended, causal=causal, mask=layout.mask)
            grad_query = dq if grad_query is None else grad_query + dq
            pieces.append((dk, dv))
        assert grad_query is not None
        grad_key, grad_value = (torch.cat(p, dim=2) if len(p) > 1 else p[0] for p in zip(*pieces, strict=True))
        grad_query = layout.gather(grad_query)
        grad_own: list[Tensor] = []
        if own:
            extra, grad_own = _own_backward(grad_out, query, out, lse, own)
            grad_query = grad_query + extra
        return (None, grad_query, grad_key, grad_value, *grad_own)


def _merge_own(query: Tensor, out: Tensor, lse: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Add own-row keys to a softmax over the causal keys."""
    groups, scale = query.shape[1] // own[0].shape[1], query.shape[-1] ** -0.5
    keys, values = own[0::2], own[1::2]
    scores = [torch.linalg.vecdot(query, per_query_head(k, groups)).float().mul_(scale) for k in keys]
    merged = torch.logsumexp(torch.stack([lse, *scores]), dim=0)
    total = out * (lse - merged).exp().unsqueeze(-1).to(out)
    for score, value in zip(scores, values, strict=True):
        weight = (score - merged).exp().unsqueeze(-1).to(out)
        total.addcmul_(weight, per_query_head(value, groups))
    return total, merged


def _own_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, own: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of the own-row terms: of the query, then of key and value of each step in turn."""
    groups, scale = query.shape[1] // own[0].shape[1], query.shape[-1] ** -0.5
    delta = torch.linalg.vecdot(grad_out, out).float()
    grad_query = torch.zeros_like(query)
    grads: list[Tensor] = []
    for key, value in zip(own[0::2], own[1::2], strict=True):
        key, value = per_query_head(key, groups), per_query_head(value, groups)
        weight = torch.linalg.vecdot(query, key).float().mul_(scale).sub_(lse).exp_()
        slope = torch.linalg.vecdot(grad_out, value).float().sub_(delta).mul_(weight).mul_(scale)
        slope = slope.unsqueeze(-1).to(query)
        grad_query.addcmul_(slope, key)
        grads.append(per_key_head(slope * query, groups))
        grads.append(per_key_head(weight.unsqueeze(-1).to(query) * grad_out, groups))
    return grad_query, grads


def attend(
    layout: QueryLayout, query: Tensor, key: Tensor, value: Tensor, *, own: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """``softmax([q·K, q·own_1, …] / √D)`` over causal keys and own-row keys, times the values.

    :param query: [R, N, D], packed rows.
    :param key: [B, G, T, D] with N a multiple of G; ``value`` the same.
    :param own: key and value [R, G, D] of each earlier unroll step.
    :returns: [R, N, D].
    """
    flat = [tensor for pair in own for tensor in pair]
    if not has_fused_kernel(query):
        return attend_plain(layout, query, key, value, own=own)
    result: Tensor = _MergedAttention.apply(layout, query, key, value, *flat)  # type: ignore[no-untyped-call]
    return result


def attend_plain(
    layout: QueryLayout, query: Tensor, key: Tensor, value: Tensor, *, own: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """:func:`attend` as it is written in formulas: every score exists.

    For devices and head sizes without a fused kernel, and to compare with.
    """
    groups, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    q_BNQD = layout.spread(query)
    scores = (q_BNQD @ per_query_head(key, groups).transpose(-1, -2)).float() * scale
    if layout.mask is not None:
        scores = scores + layout.mask
    else:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(layout.offset + 1)
        scores = scores.masked_fill(later, float("-inf"))
    spread = [[layout.spread(per_query_head(x, groups)) for x in pair] for pair in own]
    extra = [torch.linalg.vecdot(q_BNQD, k).float().unsqueeze(-1) * scale for k, _ in spread]
    weights = torch.softmax(torch.cat([scores, *extra], dim=-1), dim=-1).to(value.dtype)
    out = weights[..., : key.shape[2]] @ per_query_head(value, groups)
    for step, (_, v) in enumerate(spread):
        out = out + weights[..., key.shape[2] + step].unsqueeze(-1) * v
    return layout.gather(out)


def causal_padding_mask(valid_BT: Tensor, *, offset: int) -> Tensor:
    """Additive mask fp32 [B, 1, T − offset, T]: ``j ≤ t`` and j not padding, for queries from ``offset`` on.

    Hidden keys get a large finite number, so a row that sees no key stays finite.
    """
    length = valid_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid_BT.device).tril()[offset:]
    visible = causal & valid_BT.bool().unsqueeze(1)
    return torch.zeros(visible.shape, device=valid_BT.device).masked_fill(~visible, -1e30).unsqueeze(1)
