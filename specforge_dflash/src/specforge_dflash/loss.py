# SPDX-License-Identifier: Apache-2.0
"""Head and cross-entropy of trained slots, chunk by chunk, and how slots are weighed.

The target's head is frozen, so all that training wants of it is the gradient of each slot's cross-entropy with respect
to that slot's state. It is computed right after the chunk's logits, while they exist: full logits never do, and nothing
is computed again in backward, which only scales rows.

DFlash: arXiv 2602.06036. D-PACE: arXiv 2605.18810.

Legend: E trained slots, M blocks, K block size, X slots of a chunk, H draft hidden, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from specforge_core.modeling import FrozenHead
from torch import Tensor

from specforge_dflash.config import LossType
from specforge_dflash.rows import PackedBlocks

_CHUNK_ELEMENTS = {"cpu": 4_000_000, "cuda": 256_000_000}
"""Logits held at once: on CPU 16 MB in fp32, about what a processor's last cache holds."""


def chunk_slots(vocab_size: int, device: torch.device) -> int:
    """How many slots' logits are held at once."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"]) // vocab_size)


@dataclass(frozen=True, slots=True)
class SlotScores:
    """What the draft makes of every trained slot of a micro-batch.

    :param loss_E: cross-entropy, fp32, with gradient.
    :param correct_E: bool, the label is the draft's first choice.
    """

    blocks: PackedBlocks
    loss_E: Tensor
    correct_E: Tensor


@dataclass(frozen=True, slots=True)
class ChunkLoss:
    """One chunk after its softmax: ``probability_XV``, fp32, and per slot the loss and whether it is right."""

    probability_XV: Tensor
    loss_X: Tensor
    correct_X: Tensor


def softmax_chunk(logits_XV: Tensor, label_X: Tensor) -> ChunkLoss:
    """Cross-entropy of a chunk of logits (fp32); ties for the largest logit go to the first."""
    top_X = logits_XV.amax(-1)
    label_logit_X = logits_XV.gather(-1, label_X.unsqueeze(-1)).squeeze(-1)
    correct_X = label_logit_X == top_X
    ties = correct_X.nonzero().flatten()
    if ties.numel():  # argmax is slow; only slots whose label ties the largest need it
        correct_X[ties] = logits_XV[ties].argmax(-1) == label_X[ties]
    probability_XV = torch.softmax(logits_XV, dim=-1)
    lse_X = top_X - probability_XV.amax(-1).log()
    return ChunkLoss(probability_XV, lse_X - label_logit_X, correct_X)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_EH: Tensor, weight_VH: Tensor, label_E: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        grad_EH = torch.empty_like(states_EH) if ctx.needs_input_grad[0] else None
        losses, corrects = [], []
        for start in range(0, states_EH.shape[0], chunk):
            part = slice(start, start + chunk)
            result = softmax_chunk((states_EH[part] @ weight_VH.T).float(), label_E[part])
            losses.append(result.loss_X)
            corrects.append(result.correct_X)
            if grad_EH is not None:
                expected_XH = result.probability_XV.to(weight_VH.dtype) @ weight_VH
                torch.sub(expected_XH, weight_VH[label_E[part]], out=grad_EH[part])
        correct_E = torch.cat(corrects)
        ctx.mark_non_differentiable(correct_E)
        # Not save_for_backward: backward scales it in place and lets go of it.
        ctx.grad_EH = grad_EH
        return torch.cat(losses), correct_E

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad_EH is None:
            raise RuntimeError("the head's loss can be differentiated once only")
        grad_EH, ctx.grad_EH = ctx.grad_EH, None
        return grad_EH.mul_(grads[0].unsqueeze(-1).to(grad_EH.dtype)), None, None, None


def score_slots(blocks: PackedBlocks, states_EH: Tensor, head: FrozenHead, *, chunk: int | None = None) -> SlotScores:
    """Cross-entropy of what the head says at every trained slot.

    :param chunk: slots whose logits are held at once; default: as many as suit the device.
    """
    head.require_loaded()
    size = chunk or chunk_slots(head.weight.shape[0], states_EH.device)
    loss_E, correct_E = _CrossEntropy.apply(states_EH, head.weight, blocks.labels_E, size)  # type: ignore[no-untyped-call]
    return SlotScores(blocks, loss_E, correct_E)


@torch.no_grad()
def dpace_weights(scores: SlotScores, *, loss_type: LossType, alpha: float) -> Tensor:
    """ω of every trained slot, fp32 [E] (D-PACE): how much of the expected acceptance hangs on it.

    ``q = exp(−CE)``; ``s = (1−α) q + α`` where trained, else 1; ``P_k = Π_{j≤k} s_j``; ``S_k = Σ_{j≥k} P_j w_j``. The
    quotient ``S_k/P_k`` is summed from the back (``w_k + s_{k+1}·S_{k+1}/P_{k+1}``), which never divides.
    """
    blocks = scores.blocks
    size = blocks.layout.block_size
    survive_R = torch.ones(blocks.layout.num_rows, device=scores.loss_E.device)
    trained_R = torch.zeros_like(survive_R)
    survive_R[blocks.trained_E] = (1 - alpha) * torch.exp(-scores.loss_E) + alpha
    trained_R[blocks.trained_E] = 1.0
    survive_MK, trained_MK = survive_R.view(-1, size), trained_R.view(-1, size)
    reach_MK = survive_MK.cumprod(1)
    if loss_type == "dpace-cumulative-confidence-only":
        return reach_MK.flatten()[blocks.trained_E]
    value_MK = trained_MK.clone()
    for slot in range(size - 2, -1, -1):
        value_MK[:, slot] += survive_MK[:, slot + 1] * value_MK[:, slot + 1]
    if loss_type == "dpace":
        value_MK = value_MK * reach_MK
    return value_MK.flatten()[blocks.trained_E]


def accepted_lengths(blocks: PackedBlocks, correct_E: Tensor) -> Tensor:
    """Leading correct slots of each block, given the true tokens before each: int64 [M]; untrained slots are passed."""
    correct_R = torch.ones(blocks.layout.num_rows, dtype=torch.int64, device=correct_E.device)
    trained_R = torch.zeros_like(correct_R)
    correct_R[blocks.trained_E] = correct_E.long()
    trained_R[blocks.trained_E] = 1
    size = blocks.layout.block_size
    return (correct_R.view(-1, size).cumprod(1) * trained_R.view(-1, size)).sum(1)
