# SPDX-License-Identifier: Apache-2.0
"""Which blocks, context positions and slots a micro-batch has to compute at all.

Blocks that train nothing are left out (their anchors stay in the batch), a sample's context ends at its last anchor,
and the head sees only trained slots. All of this comes from the loss mask, before the draft runs.

Legend: B samples, T tokens, M blocks, K block size, C packed context positions, E trained slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from specforge_core.contracts import INPUT_IDS, LOSS_MASK
from torch import Tensor

from specforge_dflash.anchors import label_blocks
from specforge_dflash.block_mask import BlockLayout

ANCHORS = "anchors"
ANCHOR_KEEP = "anchor_keep"


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """Index tables of one micro-batch.

    :param anchor_tokens_M: int64, the token that each block knows.
    :param context_C: int64, index of each context position in the flattened [B, T].
    :param trained_E: int64, index of each trained slot in the flattened [M, K], in order.
    :param labels_E: int64, what it must say.
    :param longest: above every position.
    """

    layout: BlockLayout
    anchor_tokens_M: Tensor
    context_C: Tensor
    trained_E: Tensor
    labels_E: Tensor
    longest: int

    @property
    def trained_slots(self) -> Tensor:
        """int64 [E], slot of each trained slot in its block."""
        return self.trained_E % self.layout.block_size


def pack_blocks(tensors: Mapping[str, Tensor], *, block_size: int, offset: int) -> PackedBlocks | None:
    """The blocks of a collated batch that train something, or None where none does."""
    input_ids_BT, anchors_BN = tensors[INPUT_IDS], tensors[ANCHORS]
    length = input_ids_BT.shape[1]
    labels = label_blocks(
        input_ids_BT, tensors[LOSS_MASK], (anchors_BN, tensors[ANCHOR_KEEP]), block_size=block_size, offset=offset
    )
    active_BN = labels.trained_BNK.any(-1)
    sample_M, place_M = active_BN.nonzero(as_tuple=True)
    if sample_M.shape[0] == 0:
        return None
    anchors_M = anchors_BN[sample_M, place_M]
    last_B = torch.where(active_BN, anchors_BN, 0).amax(1)
    sample_C, position_C = (torch.arange(length, device=last_B.device) < last_B.unsqueeze(1)).nonzero(as_tuple=True)
    trained_E = labels.trained_BNK[sample_M, place_M].flatten().nonzero().flatten()
    return PackedBlocks(
        layout=BlockLayout(block_size, anchors_M, sample_M, sample_C, position_C),
        anchor_tokens_M=input_ids_BT[sample_M, anchors_M],
        context_C=sample_C * length + position_C,
        trained_E=trained_E,
        labels_E=labels.tokens_BNK[sample_M, place_M].flatten()[trained_E],
        longest=length + block_size,
    )
