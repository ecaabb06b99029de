# SPDX-License-Identifier: Apache-2.0
"""Drafting for real: a whole block's hidden states at once, then its tokens one after another.

Each guess is corrected by what the block has said so far, the bonus token first; the GRU reads what was drafted.

Legend: K block size, H draft hidden, S state size.
"""

from __future__ import annotations

import torch
from specforge_dflash.drafter import DflashDrafter
from torch import Tensor

from specforge_domino.causal_head import embed_correction
from specforge_domino.draft_model import DominoDraft


class DominoDrafter(DflashDrafter):
    """Greedy block drafting with token-by-token correction.

    :param max_draft_tokens: at most ``block_size − 1``, or ``block_size`` where slots guess the token after theirs.
    """

    def __init__(self, draft: DominoDraft, *, max_draft_tokens: int) -> None:
        super().__init__(draft, max_draft_tokens=max_draft_tokens)
        self._domino = draft

    @torch.no_grad()
    def propose(self, max_tokens: int) -> Tensor:
        draft, count = self._domino, min(max_tokens, self.max_draft_tokens)
        token, first = self._require_bonus(), 1 - draft.head_shape.label_offset
        states_kH = self._block_states(token, slice(first, first + count))
        logits_kV = draft.target_head.logits(states_kH)
        narrow, widen = draft.correction_layers()
        state_1S, guesses = draft.prefix_gru.start(1), []
        for place in range(count):
            state_1S = draft.prefix_gru.step(draft.prefix_gru.read(draft.embed_tokens(token)), state_1S)
            logits_1V = logits_kV[place : place + 1]
            if place >= draft.head_shape.pure_draft_prefix_len:
                logits_1V = logits_1V + widen(embed_correction(narrow, states_kH[place : place + 1], state_1S)).float()
            token = logits_1V.argmax(-1)
            guesses.append(token)
        return torch.cat(guesses) if guesses else torch.empty(0, dtype=torch.int64)
