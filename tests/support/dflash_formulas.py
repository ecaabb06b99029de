# SPDX-License-Identifier: Apache-2.0
"""DFlash and Domino written out from their formulas: one block at a time, every score and logit there, no reuse.

Slow on purpose, and sharing nothing with the distributions but the drafts' parameters.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def rms(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rope(x, positions, theta):
    """x [J, heads, D], positions [J]."""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1])
    angles = positions.float()[:, None] * frequency
    cosine, sine = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosine + turned * sine


def visible(anchor, block_size, length, window):
    """bool [K, T + K], straight from the words."""
    rows = []
    for slot in range(block_size):
        row = [j < anchor and (window is None or j >= anchor + slot - (window - 1)) for j in range(length)]
        row += [window is None or other <= slot for other in range(block_size)]
        rows.append(row)
    return torch.tensor(rows)


def block_hidden(draft, ids, aux, anchor):
    """What the head reads at every slot of one block: [K, H]. ``ids`` [T], ``aux`` [T, L, A]."""
    shape, length = draft.shape, ids.shape[0]
    theta, eps = shape.rope_parameters["rope_theta"], shape.rms_norm_eps
    context = rms(draft.fc(aux.flatten(1)), draft.hidden_norm.weight, eps)
    tokens = torch.full((shape.block_size,), shape.mask_token_id)
    tokens[0] = ids[anchor]
    y = draft.embed_tokens.weight[tokens]
    own = anchor + torch.arange(shape.block_size)
    positions = torch.cat([torch.arange(length), own])
    for number, layer in enumerate(draft.layers):
        attention, heads = layer.self_attn, (-1, shape.head_dim)
        u = rms(y, layer.input_layernorm.weight, eps)
        both = torch.cat([context, u])
        query = rms(attention.q_proj(u).unflatten(-1, heads), attention.q_norm.weight, eps)
        key = rms(attention.k_proj(both).unflatten(-1, heads), attention.k_norm.weight, eps)
        value = attention.v_proj(both).unflatten(-1, heads)
        groups = query.shape[1] // key.shape[1]
        query, key = rope(query, own, theta), rope(key, positions, theta)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qnd,jnd->nqj", query, key) / shape.head_dim**0.5
        window = shape.sliding_window if shape.layer_types[number] == "sliding_attention" else None
        seen = visible(anchor, shape.block_size, length, window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        y = y + attention.o_proj(torch.einsum("nqj,jnd->qnd", weights, value).flatten(1))
        r = rms(y, layer.post_attention_layernorm.weight, eps)
        y = y + layer.mlp.down_proj(functional.silu(layer.mlp.gate_proj(r)) * layer.mlp.up_proj(r))
    return rms(y, draft.norm.weight, eps)


def correction(draft, ids, anchor, hidden):
    """[K, V]: what the causal head adds to each slot's logits."""
    size, head = draft.shape.block_size, draft.head_shape
    gru = torch.nn.GRU(draft.shape.hidden_size, head.gru_hidden_dim, bias=False, batch_first=True)
    read = torch.tensor([ids[min(anchor + k, ids.shape[0] - 1)] for k in range(size)])
    weights = {"weight_ih_l0": draft.prefix_gru.weight_ih_l0, "weight_hh_l0": draft.prefix_gru.weight_hh_l0}
    states = torch.func.functional_call(gru, weights, (draft.embed_tokens.weight[read][None],))[0][0]
    if not head.shift_label:
        states = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    added = draft.embed_proj(torch.cat([hidden, states], -1))
    first = head.pure_draft_prefix_len + (0 if head.shift_label else 1)
    return torch.where(torch.arange(size)[:, None] >= first, added, 0)


def blocks(draft, tensors):
    """(sample, anchor) of every anchor that is kept."""
    keep = tensors["anchor_keep"].nonzero().tolist()
    return [(b, int(tensors["anchors"][b, n])) for b, n in keep]


def slots(tensors, sample, anchor, *, size, offset):
    """Labels and weights w of one block's slots."""
    ids, mask = tensors["input_ids"][sample], tensors["loss_mask"][sample]
    labels, weights = [], []
    for k in range(size):
        at = anchor + offset + k
        inside = at < ids.shape[0]
        labels.append(int(ids[at]) if inside else 0)
        weights.append(float(inside and bool(mask[at]) and (offset == 1 or k > 0)))
    return torch.tensor(labels), torch.tensor(weights)


def decay(size, gamma, offset):
    k = torch.arange(size, dtype=torch.float32)
    return torch.ones(size) if gamma is None else torch.exp(-(k - (1 - offset)).clamp_min(0) / gamma)


def dpace(ce, w, loss_type, alpha):
    size = ce.shape[0]
    s = torch.where(w > 0, (1 - alpha) * torch.exp(-ce) + alpha, torch.ones(size))
    reach = [float(torch.prod(s[: k + 1])) for k in range(size)]
    total = [sum(reach[j] * float(w[j]) for j in range(k, size)) for k in range(size)]
    by_type = {
        "dpace": total,
        "dpace-cumulative-confidence-only": reach,
        "dpace-continuation-value-only": [t / r for t, r in zip(total, reach, strict=True)],
    }
    return torch.tensor(by_type[loss_type])


def dflash_loss(draft, tensors, config):
    numerator, denominator, correct, counted = 0.0, 0.0, 0.0, 0.0
    head = draft.target_head.weight
    for sample, anchor in blocks(draft, tensors):
        labels, w = slots(tensors, sample, anchor, size=draft.shape.block_size, offset=0)
        hidden = block_hidden(draft, tensors["input_ids"][sample], tensors["aux_hidden_states"][sample], anchor)
        logits = hidden @ head.T
        ce = functional.cross_entropy(logits, labels, reduction="none")
        if config.loss_type == "dflash":
            weight = w * decay(draft.shape.block_size, config.loss_decay_gamma, 0)
            denominator += float(weight.sum())
        else:
            weight = w * dpace(ce.detach(), w, config.loss_type, config.dpace_alpha)
        numerator = numerator + (weight * ce).sum()
        correct += float((w * (logits.argmax(-1) == labels)).sum())
        counted += float(w.sum())
    denominator = denominator if config.loss_type == "dflash" else len(tensors["input_ids"])
    return numerator / denominator, correct / counted


def domino_loss(draft, tensors, config, share):
    offset, size = int(config.shift_label), draft.shape.block_size
    final, base, denominator = 0.0, 0.0, 0.0
    for sample, anchor in blocks(draft, tensors):
        ids = tensors["input_ids"][sample]
        labels, w = slots(tensors, sample, anchor, size=size, offset=offset)
        hidden = block_hidden(draft, ids, tensors["aux_hidden_states"][sample], anchor)
        logits = hidden @ draft.target_head.weight.T
        corrected = logits + correction(draft, ids, anchor, hidden)
        weight = w * decay(size, config.loss_decay_gamma, offset)
        base = base + (weight * functional.cross_entropy(logits, labels, reduction="none")).sum()
        final = final + (weight * functional.cross_entropy(corrected, labels, reduction="none")).sum()
        denominator += float(weight.sum())
    return ((1 - share) * final + share * base) / denominator
