# SPDX-License-Identifier: Apache-2.0
"""The Domino draft: DFlash's, and the correction head under the names servers load.

Legend: B samples, T tokens, M blocks, K block size, E trained slots, C corrected ones, L captured layers, H draft
hidden, S state size, Q rank of the correction, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES, INPUT_IDS
from specforge_dflash.config import DraftShape
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.rows import PackedBlocks, pack_blocks
from torch import Tensor, nn

from specforge_domino.causal_head import PrefixGru, block_states, embed_correction
from specforge_domino.config import HeadShape
from specforge_domino.loss import CorrectedScores, Correction, SlotWeights, score_corrected

_INITIAL_STD = 0.02  # as GPT-2 and the models that are drafted for


class DominoDraft(DflashDraft):
    """A Domino draft (arXiv 2605.29707). ``state_dict`` is the checkpoint, as of :class:`DflashDraft`."""

    def __init__(self, shape: DraftShape, head_shape: HeadShape) -> None:
        super().__init__(shape)
        self.head_shape = head_shape
        joined = shape.hidden_size + head_shape.gru_hidden_dim
        self.prefix_gru = PrefixGru(shape.hidden_size, head_shape.gru_hidden_dim)
        self.embed_proj = nn.Sequential(
            nn.Linear(joined, head_shape.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(head_shape.emb_dim, shape.vocab_size, bias=False),
        )
        for module in self.embed_proj:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL_STD)

    def correction_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """W1 [Q, H + S] and W2 [V, Q]."""
        first, _, second = self.embed_proj
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        return first, second

    def correct(self, states_EH: Tensor, input_ids_BT: Tensor, blocks: PackedBlocks) -> Correction:
        """The correction of every trained slot that has one, the block's true tokens read up to it."""
        slots_E = blocks.trained_slots
        corrected_E = slots_E >= self.head_shape.first_corrected_slot
        rows_C = corrected_E.nonzero().flatten()
        states_MKS = block_states(self.prefix_gru, self.embed_tokens, input_ids_BT, blocks=blocks)
        # The state that has read everything before the guessed token: up to the slot itself, or the one before it.
        # A first slot that guesses its own position is never trained, so slot − 1 stays inside the block.
        read_C = blocks.trained_E[rows_C] - (1 - self.head_shape.label_offset)
        first, second = self.correction_layers()
        embedded_CQ = embed_correction(first, states_EH[rows_C], states_MKS.flatten(0, 1)[read_C])
        return Correction(corrected_E, embedded_CQ, second.weight)

    def forward(  # type: ignore[override]
        self, tensors: Mapping[str, Tensor], *, slot_weights_K: Tensor, base_share: float
    ) -> CorrectedScores | None:
        """Both losses of every trained slot of a collated batch; None where there is none.

        :param slot_weights_K: δ.
        :param base_share: λ, the weight of the uncorrected loss; the corrected one has 1 − λ.
        """
        offset = self.head_shape.label_offset
        blocks = pack_blocks(tensors, block_size=self.shape.block_size, offset=offset)
        if blocks is None:
            return None
        states_EH = self.trained_states(tensors[AUX_HIDDEN_STATES], blocks)
        correction = self.correct(states_EH, tensors[INPUT_IDS], blocks)
        weight_E = slot_weights_K.to(states_EH.device, torch.float32)[blocks.trained_slots]
        weights = SlotWeights(weight_E * (1 - base_share), weight_E * base_share)
        return score_corrected(blocks, states_EH, self.target_head, correction=correction, weights=weights)
