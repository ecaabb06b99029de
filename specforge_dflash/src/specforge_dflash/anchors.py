# SPDX-License-Identifier: Apache-2.0
"""Where blocks begin and what their slots must say. Runs at collate, on CPU, before the draft.

An anchor is a position whose token is known; the block that begins there guesses what follows. Anchors are drawn from
a sample's own seed and its own loss mask, so batch, rank and padding do not move them (DFlash, arXiv 2602.06036).

Legend: B samples, T tokens, N anchors, K block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def choose_anchors(loss_mask_T: Tensor, *, num_anchors: int, seed: int) -> Tensor:
    """Up to ``num_anchors`` positions t with t and t + 1 trained, uniformly without replacement: sorted int64 [N]."""
    mask = loss_mask_T.bool()
    candidates = (mask[:-1] & mask[1:]).nonzero().flatten()
    if candidates.shape[0] <= num_anchors:
        return candidates
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(candidates.shape[0], generator=generator)[:num_anchors]
    return candidates[chosen].sort().values


def pad_anchors(anchors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Anchors int64 [B, N] of all samples, zero where a sample has fewer, and which of them are real: bool [B, N]."""
    counts = torch.tensor([len(each) for each in anchors])
    padded = torch.nn.utils.rnn.pad_sequence(list(anchors), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < counts.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class BlockLabels:
    """``tokens_BNK``: int64, what each slot must say; ``trained_BNK``: bool, the weights w, which are 0 or 1."""

    tokens_BNK: Tensor
    trained_BNK: Tensor


def label_blocks(
    input_ids_BT: Tensor, loss_mask_BT: Tensor, anchors: tuple[Tensor, Tensor], *, block_size: int, offset: int
) -> BlockLabels:
    """What the slots of every block are trained on.

    :param anchors: positions [B, N] and which are real [B, N].
    :param offset: 0: slot k guesses the token at a + k, and slot 0, which knows it, is not trained; 1: slot k guesses
        the token at a + k + 1, and slot 0 is trained.
    """
    anchors_BN, keep_BN = anchors
    length = input_ids_BT.shape[1]
    slots_K = torch.arange(block_size, device=anchors_BN.device)
    positions_BNK = anchors_BN.unsqueeze(-1) + slots_K + offset
    inside_BNK = positions_BNK < length
    flat_BX = positions_BNK.clamp(max=length - 1).flatten(1)
    tokens_BNK = input_ids_BT.gather(1, flat_BX).view_as(positions_BNK)
    mask_BNK = loss_mask_BT.bool().gather(1, flat_BX).view_as(positions_BNK)
    trained_BNK = keep_BN.unsqueeze(-1) & inside_BNK & mask_BNK
    if offset == 0:
        trained_BNK &= slots_K > 0
    return BlockLabels(tokens_BNK, trained_BNK)


def slot_weights(block_size: int, *, gamma: float | None, offset: int) -> Tensor:
    """δ, fp32 [K]: ``exp(−max(k − 1 + offset, 0)/γ)``; ones without γ."""
    if gamma is None:
        return torch.ones(block_size)
    distance = (torch.arange(block_size, dtype=torch.float32) - 1 + offset).clamp_min(0)
    return torch.exp(-distance / gamma)
