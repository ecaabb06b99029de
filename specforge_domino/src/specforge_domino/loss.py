# SPDX-License-Identifier: Apache-2.0
"""Head and both cross-entropies of trained slots, chunk by chunk: of the draft's own logits and of the corrected ones.

One product gives a chunk's base logits; the correction is added at low rank. What backward needs is computed while the
logits exist: the two losses' gradients are added before the one product with the frozen head. Full logits never exist,
and nothing is computed again.

Legend: E trained slots, X slots of a chunk, C corrected slots, H draft hidden, Q rank of the correction, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from specforge_core.modeling import FrozenHead
from specforge_dflash.loss import ChunkLoss, chunk_slots, softmax_chunk
from specforge_dflash.rows import PackedBlocks
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SlotWeights:
    """Coefficients of the two losses at every trained slot, fp32 [E] each."""

    final_E: Tensor
    base_E: Tensor


@dataclass(frozen=True, slots=True)
class CorrectedScores:
    """What the draft makes of every trained slot, without and with the correction.

    :param numerator: Σ final_E · CE(final) + base_E · CE(base), with gradient; scalar.
    :param base_E: cross-entropy without the correction, fp32, no gradient; ``final_E`` with it.
    """

    blocks: PackedBlocks
    numerator: Tensor
    final_E: Tensor
    base_E: Tensor
    final_correct_E: Tensor
    base_correct_E: Tensor


@dataclass(frozen=True, slots=True)
class HeadInputs:
    """What is not differentiated.

    :param corrected_E: bool, the slot's logits are corrected; the C rows of the correction are those, in order.
    :param chunk: slots whose logits are held at once.
    """

    weight_VH: Tensor
    label_E: Tensor
    corrected_E: Tensor
    weights: SlotWeights
    chunk: int


class _Gradients:
    """Gradients of the numerator, filled chunk by chunk."""

    def __init__(self, states_EH: Tensor, embedded_CQ: Tensor, output_VQ: Tensor) -> None:
        self.states = torch.empty_like(states_EH)
        self.embedded = torch.empty_like(embedded_CQ)
        self.output = torch.zeros_like(output_VQ, dtype=torch.float32)


def _slope(result: ChunkLoss, label_X: Tensor, weight_X: Tensor) -> Tensor:
    """``weight · (p − onehot)``, in place of the probabilities: [X, V]."""
    slope_XV = result.probability_XV
    slope_XV[torch.arange(label_X.shape[0], device=label_X.device), label_X] -= 1
    return slope_XV.mul_(weight_X.unsqueeze(1))


class _CorrectedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_EH: Tensor, embedded_CQ: Tensor, output_VQ: Tensor, inputs: HeadInputs, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _Gradients(states_EH, embedded_CQ, output_VQ) if wanted else None
        count = states_EH.shape[0]
        losses_2E = torch.empty(2, count, device=states_EH.device)
        correct_2E = torch.empty(2, count, dtype=torch.bool, device=states_EH.device)
        ends = inputs.corrected_E.long().cumsum(0).tolist()
        for start in range(0, count, inputs.chunk):
            part = slice(start, min(start + inputs.chunk, count))
            rows = slice(ends[start - 1] if start else 0, ends[part.stop - 1])
            where_X = inputs.corrected_E[part].nonzero().flatten()
            logits_XV = (states_EH[part] @ inputs.weight_VH.T).float()
            base = softmax_chunk(logits_XV, inputs.label_E[part])
            logits_XV.index_add_(0, where_X, (embedded_CQ[rows] @ output_VQ.T).float())
            final = softmax_chunk(logits_XV, inputs.label_E[part])
            losses_2E[:, part] = torch.stack([final.loss_X, base.loss_X])
            correct_2E[:, part] = torch.stack([final.correct_X, base.correct_X])
            if grads is None:
                continue
            slope_XV = _slope(final, inputs.label_E[part], inputs.weights.final_E[part])
            slope_cV = slope_XV[where_X].to(output_VQ.dtype)
            grads.embedded[rows] = slope_cV @ output_VQ
            grads.output += slope_cV.T @ embedded_CQ[rows]
            slope_XV += _slope(base, inputs.label_E[part], inputs.weights.base_E[part])
            grads.states[part] = slope_XV.to(inputs.weight_VH.dtype) @ inputs.weight_VH
        weights_2E = torch.stack([inputs.weights.final_E, inputs.weights.base_E])
        ctx.mark_non_differentiable(losses_2E, correct_2E)
        # Not save_for_backward: backward scales them in place and lets go of them.
        ctx.grads, ctx.dtype = grads, output_VQ.dtype
        return (weights_2E * losses_2E).sum(), losses_2E, correct_2E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the head's loss can be differentiated once only")
        found, ctx.grads = ctx.grads, None
        scaled = (each.mul_(grads[0]) for each in (found.states, found.embedded, found.output))
        states, embedded, output = scaled
        return states, embedded, output.to(ctx.dtype), None, None


@dataclass(frozen=True, slots=True)
class Correction:
    """``embedded_CQ``: the corrected slots' low-rank codes, in order; ``output_VQ``: what makes logits of them."""

    corrected_E: Tensor
    embedded_CQ: Tensor
    output_VQ: Tensor


def score_corrected(
    blocks: PackedBlocks,
    states_EH: Tensor,
    head: FrozenHead,
    *,
    correction: Correction,
    weights: SlotWeights,
    chunk: int | None = None,
) -> CorrectedScores:
    """Both cross-entropies of every trained slot.

    :param chunk: slots whose logits are held at once; default: as many as suit the device.
    """
    head.require_loaded()
    # Two distributions are held at a time.
    size = chunk or max(1, chunk_slots(head.weight.shape[0], states_EH.device) // 2)
    inputs = HeadInputs(head.weight, blocks.labels_E, correction.corrected_E, weights, size)
    numerator, losses_2E, correct_2E = _CorrectedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        states_EH, correction.embedded_CQ, correction.output_VQ, inputs, torch.is_grad_enabled()
    )
    return CorrectedScores(blocks, numerator, losses_2E[0], losses_2E[1], correct_2E[0], correct_2E[1])
