# SPDX-License-Identifier: Apache-2.0
"""The causal correction head: what a block has said so far corrects what its later slots say.

A GRU reads the block's tokens; its state and a slot's hidden state give a low-rank correction to the slot's logits.
In training the tokens are the true ones (teacher forcing), so all slots of all blocks are computed at once; in decoding
they are those just drafted, one after another (Domino, arXiv 2605.29707).

Legend: P positions, M blocks, K block size, E corrected slots, H draft hidden, S state size, Q rank of the correction.
"""

from __future__ import annotations

import math

import torch
from specforge_dflash.rows import PackedBlocks
from torch import Tensor, nn
from torch.nn import functional


class PrefixGru(nn.Module):
    """One GRU layer without biases, under torch's parameter names; its input products are the caller's to share.

    Blocks overlap, so a token stands in many of them: its product with ``weight_ih_l0`` is computed once per position.
    """

    def __init__(self, input_size: int, state_size: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(state_size)
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_size, input_size).uniform_(-bound, bound))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_size, state_size).uniform_(-bound, bound))

    def start(self, count: int) -> Tensor:
        """The state before any token: zeros [count, S]."""
        return self.weight_hh_l0.new_zeros(count, self.weight_hh_l0.shape[1])

    def read(self, embedded_PH: Tensor) -> Tensor:
        """What tokens contribute to the gates: [P, H] → [P, 3S]."""
        return embedded_PH @ self.weight_ih_l0.T

    def step(self, gates_MG: Tensor, state_MS: Tensor) -> Tensor:
        """The state after one more token, whose :meth:`read` is ``gates_MG``."""
        reset_x, update_x, new_x = gates_MG.chunk(3, dim=1)
        reset_h, update_h, new_h = (state_MS @ self.weight_hh_l0.T).chunk(3, dim=1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        candidate = torch.tanh(new_x + reset * new_h)
        return candidate + update * (state_MS - candidate)


def block_states(gru: PrefixGru, embedding: nn.Module, input_ids_BT: Tensor, *, blocks: PackedBlocks) -> Tensor:
    """The GRU's state after each token of each block, the true tokens read: [M, K, S].

    Tokens past a sample's end are read as its padding; nothing trained depends on them.
    """
    layout, length = blocks.layout, input_ids_BT.shape[1]
    size = layout.block_size
    positions_R = layout.slot_positions.clamp(max=length - 1)
    flat_R = layout.sample_M.repeat_interleave(size) * length + positions_R
    read_P, place_R = flat_R.unique(return_inverse=True)
    gates_PG = gru.read(embedding(input_ids_BT.flatten()[read_P]))
    place_MK = place_R.view(-1, size)
    state_MS, states = gru.start(place_MK.shape[0]), []
    for slot in range(size):
        state_MS = gru.step(gates_PG[place_MK[:, slot]], state_MS)
        states.append(state_MS)
    return torch.stack(states, dim=1)


def embed_correction(projection: nn.Linear, hidden_EH: Tensor, state_ES: Tensor) -> Tensor:
    """``silu(W1·[h; G])``: [E, H] and [E, S] → [E, Q]."""
    return functional.silu(projection(torch.cat([hidden_EH, state_ES], dim=1)))
