# SPDX-License-Identifier: Apache-2.0
"""EAGLE3 as its formulas read, one line per line, nothing fused: what the real thing is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from specforge_eagle3.draft_model import Eagle3Draft
from torch import Tensor


@dataclass(frozen=True)
class PlainResult:
    loss: Tensor
    accuracy: list[tuple[float, float]]
    acceptance: list[float]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    size = x.shape[-1]
    frequency = theta ** -(torch.arange(0, size, 2).float() / size)
    angle = torch.cat([positions[:, None] * frequency] * 2, -1)
    half = size // 2
    return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


def _shift(x: Tensor, steps: int, fill: float = 0) -> Tensor:
    """a_k[t] = a[t + k] along dimension 1."""
    if steps == 0:
        return x
    padding = torch.full_like(x[:, :steps], fill)
    return torch.cat([x[:, steps:], padding[:, : min(steps, x.shape[1])]], 1)[:, : x.shape[1]]


def plain_loss(draft: Eagle3Draft, tensors: dict[str, Tensor], options: dict) -> PlainResult:
    shape, P = draft.shape, dict(draft.named_parameters())
    S, eps = options["ttt_steps"], shape.rms_norm_eps
    ids, mask = tensors["input_ids"], tensors["loss_mask"].float()
    B, T = ids.shape
    valid = tensors.get("attention_mask", torch.ones(B, T)).bool()
    aux, last = tensors["aux_hidden_states"], _shift(tensors["last_hidden_states"], 1)
    if shape.last_hidden_norm == "pre":
        last = _norm(last, draft.target_head.norm_weight, eps)
    x, z = _shift(ids, 1), last @ draft.target_head.weight.T
    y = z.argmax(-1)
    pm = mask * draft.t2d[y]
    p_tilde = z[..., draft.t2d].softmax(-1)
    p = (z[..., draft.t2d] - z.logsumexp(-1, keepdim=True)).exp()
    parts = [aux[:, :, i] for i in range(shape.num_aux)]
    if shape.fc_norm:
        parts = [_norm(a, P[f"fc_norm.{i}.weight"], eps) for i, a in enumerate(parts)]
    g = torch.cat(parts, -1) @ P["fc.weight"].T
    N, G, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    theta = shape.rope_parameters["rope_theta"]
    name = "midlayer.self_attn.{}_proj.weight"
    visible = torch.ones(T, T).tril().bool() & valid[:, None, None, :]
    keys, values, total = [], [], torch.zeros(())
    accuracy, acceptance = [], []
    divisor = mask.sum() if options["loss_normalizer"] == "tokens" else torch.tensor(float(B * T))
    for k in range(S):
        e = draft.embed_tokens.weight[_shift(x, k)]
        c = torch.cat(
            [
                _norm(e, P["midlayer.input_layernorm.weight"], eps),
                _norm(g, P["midlayer.hidden_norm.weight"], eps),
            ],
            -1,
        )
        q, key, value = ((c @ P[name.format(n)].T).view(B, T, -1, D).transpose(1, 2) for n in "qkv")
        positions = torch.arange(T).float() + k
        q, key = _turn(q, positions, theta), _turn(key, positions, theta)
        keys.append(key.repeat_interleave(N // G, 1))
        values.append(value.repeat_interleave(N // G, 1))
        scores = (q @ keys[0].transpose(-1, -2)) / D**0.5
        scores = scores.masked_fill(~visible, -1e30)
        own = [(q * keys[i]).sum(-1, keepdim=True) / D**0.5 for i in range(1, k + 1)]
        weight = torch.cat([scores, *own], -1).softmax(-1)
        o = weight[..., :T] @ values[0] + sum(weight[..., T + i - 1, None] * values[i] for i in range(1, k + 1))
        u = g + o.transpose(1, 2).reshape(B, T, -1) @ P[name.format("o")].T
        r = _norm(u, P["midlayer.post_attention_layernorm.weight"], eps)
        gated = torch.nn.functional.silu(r @ P["midlayer.mlp.gate_proj.weight"].T)
        g = u + (gated * (r @ P["midlayer.mlp.up_proj.weight"].T)) @ P["midlayer.mlp.down_proj.weight"].T
        head_in = _norm(g, P["norm.weight"], eps) if shape.norm_output else g
        logits = head_in @ P["lm_head.weight"].T
        lq = logits.log_softmax(-1)
        pm_k, m_k, y_k = _shift(pm, k), _shift(mask, k), _shift(y, k)
        kl = -(pm_k * (_shift(p_tilde, k, 1.0 / p.shape[-1]) * lq).sum(-1)).sum() / divisor
        alpha = torch.minimum(_shift(p, k), lq.exp()).sum(-1)
        counted = pm_k.sum().clamp_min(1e-8)
        mean = (pm_k * alpha).sum() / counted
        mean_log = (pm_k * alpha.masked_fill(pm_k == 0, 1).log()).sum() / counted
        w = options["kl_scale"] * torch.exp(-options["kl_decay"] * mean.detach())
        step = {"none": kl, "alpha": -mean_log, "lambda": w * kl + (1 - w) * (1 - mean)}[options["lk_loss_type"]]
        total = total + options.get("step_decay", 0.8) ** k * step
        guess = logits.argmax(-1)
        correct = (m_k * (guess + draft.d2t[guess] == y_k)).sum()
        accuracy.append((correct.item(), m_k.sum().item()))
        acceptance.append(mean.item())
    return PlainResult(total, accuracy, acceptance)
