# SPDX-License-Identifier: Apache-2.0
"""Head and loss of all unroll steps in one pass over chunks of trained positions.

The S rows that look at one trained position share the target's distribution there, so chunks are cut along trained
positions: the target's logits of a chunk, its softmax statistics, the draft's logits of S rows each, the loss and its
gradient follow one another while they are in cache, and neither [rows, W] nor [positions, V] ever exists as a whole.
Gradients are taken in the forward pass (the loss is a sum of known weights) and only scaled in backward.

KL: EAGLE-3 (arXiv 2503.01840). Acceptance losses: LK losses (arXiv 2602.23881).

Legend: M trained positions, C positions of a chunk, S unroll steps, R needed rows, H draft hidden, A target hidden,
V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from specforge_core.modeling import FrozenHead, VocabMap
from torch import Tensor

_CACHE_ELEMENTS = 4_000_000  # 16 MB in fp32, about what a processor's last cache holds
_DEVICE_ELEMENTS = 64_000_000  # 256 MB in fp32, a product large enough for a device


def _chunk_size(device: torch.device, width: int) -> int:
    """Positions of a chunk: on CPU its logits fit a processor's last cache (16 MB), elsewhere they fill the device."""
    return max(1, (_CACHE_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS) // width)


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Coefficients, one per unroll step, of the sums over trained rows that make up the loss numerator."""

    kl: tuple[float, ...]
    alpha: tuple[float, ...]
    log_alpha: tuple[float, ...]

    @property
    def use_acceptance(self) -> bool:
        return any(self.alpha) or any(self.log_alpha)


@dataclass(frozen=True, slots=True)
class Labels:
    """The target's side of the loss.

    :param hidden_MA: last hidden states that give the logits at each trained position; zero past the end.
    """

    head: FrozenHead
    vocabulary: VocabMap
    hidden_MA: Tensor


@dataclass(frozen=True, slots=True)
class RowIndex:
    """``rows_SM``: row of ``[R]`` that predicts position i at step k; ``counted_SM``: false where there is none."""

    rows_SM: Tensor
    counted_SM: Tensor


@dataclass(frozen=True, slots=True)
class UnrollSums:
    """Sums per unroll step, fp32 [S] each, over the rows of one micro-batch.

    :param numerator: the weighted sum that is trained, with gradient; scalar.
    :param counted: rows whose label is in the draft vocabulary, Σ pm.
    :param trained: all trained rows, Σ m.
    """

    numerator: Tensor
    kl: Tensor
    alpha: Tensor
    log_alpha: Tensor
    counted: Tensor
    correct: Tensor
    trained: Tensor


@dataclass(slots=True)
class _Chunk:
    """One chunk of positions whose label is in the draft vocabulary.

    :param prob_CW: the target's probabilities of draft tokens, not renormalised.
    :param label_C: the label as a draft token id.
    """

    rows_SC: Tensor
    counted_SC: Tensor
    prob_CW: Tensor
    label_C: Tensor


def _label_chunk(labels: Labels, index: RowIndex, chunk: slice) -> _Chunk | None:
    """The target's side of one chunk; None where no label is in the draft vocabulary."""
    logits_CV = labels.head.logits(labels.hidden_MA[chunk])
    label_C = logits_CV.argmax(-1)
    rows_SC, counted_SC = index.rows_SM[:, chunk], index.counted_SM[:, chunk]
    t2d, target_ids = labels.vocabulary.t2d, labels.vocabulary.target_ids
    lse_C = logits_CV.logsumexp(-1, keepdim=True)
    keep_C = t2d[label_C]
    if not bool(keep_C.all()):
        kept = keep_C.nonzero().flatten()
        if kept.numel() == 0:
            return None
        logits_CV, lse_C, label_C = logits_CV[kept], lse_C[kept], label_C[kept]
        rows_SC, counted_SC = rows_SC[:, kept], counted_SC[:, kept]
    if target_ids.shape[0] < t2d.shape[0]:
        logits_CV = logits_CV.index_select(1, target_ids)
        label_C = torch.searchsorted(target_ids, label_C)
    return _Chunk(rows_SC, counted_SC, logits_CV.sub_(lse_C).exp_(), label_C)


def _count_correct(logits_SCW: Tensor, top_SC: Tensor, label_C: Tensor) -> Tensor:
    """bool [S, C]: the label is the first of the largest logits. Only rows where it ties the largest are searched."""
    label_SC1 = label_C.expand(logits_SCW.shape[:2]).unsqueeze(-1)
    correct = logits_SCW.gather(-1, label_SC1).squeeze(-1) == top_SC
    ties = correct.nonzero(as_tuple=True)
    if ties[0].numel():
        correct[ties] = logits_SCW[ties].argmax(-1) == label_SC1.squeeze(-1)[ties]
    return correct


class _Accumulator:
    """Walks over chunks and adds up sums per step and, where wanted, gradients."""

    def __init__(self, hidden_SRH: Tensor, weight_WH: Tensor, weights: StepWeights, wanted: tuple[bool, bool]) -> None:
        steps, device = hidden_SRH.shape[0], hidden_SRH.device
        self.hidden_NH, self.weight_WH = hidden_SRH.flatten(0, 1), weight_WH
        self.row_count = hidden_SRH.shape[1]
        self.first_row = torch.arange(steps, device=device).unsqueeze(1) * self.row_count
        self.weights = weights
        self.kl_S1, self.alpha_S1, self.log_alpha_S1 = (
            torch.tensor(w, device=device).unsqueeze(1) for w in (weights.kl, weights.alpha, weights.log_alpha)
        )
        self.sums = torch.zeros(5, steps, device=device)  # kl, alpha, log alpha, counted, correct
        self.grad_hidden = torch.zeros_like(self.hidden_NH) if wanted[0] else None
        self.grad_weight = torch.zeros_like(weight_WH, dtype=torch.float32) if wanted[1] else None

    def add(self, chunk: _Chunk) -> None:
        steps, positions = chunk.rows_SC.shape
        flat_N = (chunk.rows_SC + self.first_row).flatten()
        hidden_NH = self.hidden_NH[flat_N]
        logits_SCW = (hidden_NH @ self.weight_WH.T).float().view(steps, positions, -1)
        counted = chunk.counted_SC.float()
        top_SC = logits_SCW.amax(-1)
        correct = _count_correct(logits_SCW, top_SC, chunk.label_C)
        q_SCW = torch.softmax(logits_SCW, dim=-1)
        lse_SC = top_SC - q_SCW.amax(-1).log()
        renormalised = chunk.prob_CW / chunk.prob_CW.sum(-1, keepdim=True)
        kl = lse_SC - logits_SCW.mul_(renormalised).sum(-1)
        alpha = torch.minimum(q_SCW, chunk.prob_CW, out=logits_SCW).sum(-1)
        log_alpha = alpha.clamp_min(torch.finfo(torch.float32).tiny).log()
        terms = torch.stack([kl, alpha, log_alpha, torch.ones_like(kl), correct.float()])
        self.sums += (terms * counted).sum(-1)
        if self.grad_hidden is None and self.grad_weight is None:
            return
        row_scale = counted
        if self.weights.use_acceptance:
            slope = (self.alpha_S1 + self.log_alpha_S1 * (-log_alpha).exp()).unsqueeze(-1)
            grad_SCW = _acceptance_gradient(q_SCW, chunk.prob_CW, slope, scratch=logits_SCW)
            grad_SCW.add_(q_SCW.sub_(renormalised).mul_(self.kl_S1.unsqueeze(-1)))
        else:
            grad_SCW = q_SCW.sub_(renormalised)
            row_scale = counted * self.kl_S1
        self._add_gradient(flat_N, hidden_NH, grad_SCW.flatten(0, 1), row_scale.flatten().unsqueeze(-1))

    def _add_gradient(self, flat_N: Tensor, hidden_NH: Tensor, grad_NW: Tensor, scale_N1: Tensor) -> None:
        """Rows are scaled at width H, not W."""
        grad_NW = grad_NW.to(hidden_NH.dtype)
        if self.grad_weight is not None:
            scaled = hidden_NH * scale_N1.to(hidden_NH.dtype)
            if scaled.dtype == torch.float32:
                self.grad_weight.addmm_(grad_NW.T, scaled)
            else:
                self.grad_weight += grad_NW.T @ scaled
        if self.grad_hidden is not None:
            grad_NH = (grad_NW @ self.weight_WH).mul_(scale_N1.to(hidden_NH.dtype))
            # Each counted row occurs once; uncounted ones repeat row 0 and must add their zeros.
            self.grad_hidden.index_add_(0, flat_N, grad_NH)


def _acceptance_gradient(q_SCW: Tensor, prob_CW: Tensor, slope_SC1: Tensor, *, scratch: Tensor) -> Tensor:
    """``slope · ∂/∂ℓ Σ_v min(p, softmax(ℓ))``: q∘(i − Σ i q) with i = 1 where q < p, ½ where they are equal."""
    inside = torch.sub(prob_CW, q_SCW, out=scratch).sign_().add_(1).mul_(0.5)
    inside.mul_(q_SCW)
    total = inside.sum(-1, keepdim=True)
    return inside.sub_(q_SCW * total).mul_(slope_SC1)


class _DistilUnroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_SRH: Tensor, weight_WH: Tensor, labels: Labels, index: RowIndex, weights: StepWeights
    ) -> tuple[Tensor, Tensor]:
        wanted = (bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1]))
        total = _Accumulator(hidden_SRH, weight_WH, weights, wanted)
        widest = max(labels.head.weight.shape[0], hidden_SRH.shape[0] * weight_WH.shape[0])
        size = _chunk_size(hidden_SRH.device, widest)
        for start in range(0, labels.hidden_MA.shape[0], size):
            chunk = _label_chunk(labels, index, slice(start, start + size))
            if chunk is not None:
                total.add(chunk)
        sums = total.sums
        numerator = (total.kl_S1.T @ sums[0] + total.alpha_S1.T @ sums[1] + total.log_alpha_S1.T @ sums[2]).squeeze(0)
        ctx.mark_non_differentiable(sums)
        ctx.shape, ctx.dtype = hidden_SRH.shape, weight_WH.dtype
        # Not save_for_backward: backward scales them in place and lets go of them.
        ctx.grads = total.grad_hidden, total.grad_weight
        return numerator, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the unrolled loss can be differentiated once only")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grads[0]).view(ctx.shape)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grads[0]).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


def distil(
    hidden_SRH: Tensor, weight_WH: Tensor, *, labels: Labels, index: RowIndex, weights: StepWeights
) -> UnrollSums:
    """Head and loss of every step.

    :param hidden_SRH: what the draft's head reads, for every needed row.
    :param weight_WH: the draft's head.
    """
    labels.head.require_loaded()
    numerator, sums = _DistilUnroll.apply(hidden_SRH, weight_WH, labels, index, weights)  # type: ignore[no-untyped-call]
    trained = index.counted_SM.sum(1).float()
    kl, alpha, log_alpha, counted, correct = sums.unbind(0)
    return UnrollSums(numerator, kl, alpha, log_alpha, counted, correct, trained)


@torch.no_grad()
def count_in_vocabulary(labels: Labels, counted_SM: Tensor) -> Tensor:
    """Σ pm of every step, fp32 [S], from the target's side alone: no draft runs."""
    labels.head.require_loaded()
    if not labels.hidden_MA.shape[0]:
        return counted_SM.sum(1).float()
    size = _chunk_size(labels.hidden_MA.device, labels.head.weight.shape[0])
    inside = [labels.vocabulary.t2d[labels.head.logits(part).argmax(-1)] for part in labels.hidden_MA.split(size)]
    return (counted_SM & torch.cat(inside)).sum(1).float()
