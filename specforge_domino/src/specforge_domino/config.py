# SPDX-License-Identifier: Apache-2.0
"""Domino's section of the run file: that of a block-parallel draft, the correction head's sizes and the base loss.

Read by ``specforge plan``: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from specforge_dflash.config import BlockDraftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Everything that fixes the correction head.

    :param pure_draft_prefix_len: draft tokens of a block that are taken as the draft says, without correction.
    :param shift_label: slot k guesses the token after its own position, else the one at it.
    """

    emb_dim: int = 256
    gru_hidden_dim: int = 1024
    pure_draft_prefix_len: int = 1
    shift_label: bool = True

    @property
    def label_offset(self) -> int:
        return int(self.shift_label)

    @property
    def first_corrected_slot(self) -> int:
        return self.pure_draft_prefix_len + 1 - self.label_offset


class DominoConfig(BlockDraftConfig):
    """Domino: DFlash's draft, whose guesses are corrected one after another by a small recurrent head."""

    name: str = "domino"
    emb_dim: int = Field(256, ge=1, description="rank of the correction to the logits")
    gru_hidden_dim: int = Field(1024, ge=1, description="state of the recurrent net that reads the block so far")
    pure_draft_prefix_len: int = Field(1, ge=0, description="draft tokens of a block that are not corrected")
    shift_label: bool = Field(True, description="slots guess the token after their position (else the one at it)")
    lambda_base_start: float = Field(1.0, ge=0, le=1, description="weight of the uncorrected loss at the beginning")
    lambda_base_decay_ratio: float = Field(0.5, ge=0, le=1, description="share of the run until that weight is zero")

    @property
    def label_offset(self) -> int:
        return int(self.shift_label)

    def head_shape(self) -> HeadShape:
        return HeadShape(
            emb_dim=self.emb_dim,
            gru_hidden_dim=self.gru_hidden_dim,
            pure_draft_prefix_len=self.pure_draft_prefix_len,
            shift_label=self.shift_label,
        )
