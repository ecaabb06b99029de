# SPDX-License-Identifier: Apache-2.0
"""Drafting for real: one sequence, keys and values of the context per layer, a whole block at once.

The bonus token is the anchor of a block: it has no features yet, and training hides an anchor's own feature too. Every
verified position is projected once, when it arrives; a proposal adds the block's own slots behind the cache, where the
next ``extend`` overwrites them.

Legend: n new positions, K block size, L captured layers, A target hidden, N query heads, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES, Drafter
from torch import Tensor
from torch.nn import functional

from specforge_dflash.draft_model import DflashDraft

_GROWTH = 256  # positions: a full cache is copied once in so many tokens


class DflashDrafter(Drafter):
    """Greedy block drafting.

    :param max_draft_tokens: at most ``block_size − 1``.
    """

    def __init__(self, draft: DflashDraft, *, max_draft_tokens: int) -> None:
        self._draft = draft
        self._max_draft_tokens = max_draft_tokens
        shape = draft.shape
        empty = draft.fc.weight.new_empty(len(shape.layer_types), 2, shape.num_key_value_heads, 0, shape.head_dim)
        self._cache = empty  # layer, key or value, head, position
        with torch.no_grad():
            self._folded = [layer.fold() for layer, _ in draft.decoder_layers()]
        self.reset()

    @property
    def max_draft_tokens(self) -> int:
        return self._max_draft_tokens

    def reset(self) -> None:
        self._length = 0
        self._bonus_1: Tensor | None = None

    def _reserve(self, length: int) -> None:
        if length > self._cache.shape[3]:
            old = self._cache
            self._cache = old.new_empty(*old.shape[:3], length + _GROWTH, old.shape[4])
            self._cache[:, :, :, : self._length] = old[:, :, :, : self._length]

    def _angles(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + count, device=self._cache.device)
        return self._draft.rotary.at(positions, start + count)

    def _write(self, layer: int, start: int, pair: tuple[Tensor, Tensor]) -> None:
        for place, rows in enumerate(pair):
            self._cache[layer, place, :, start : start + rows.shape[0]] = rows.transpose(0, 1)

    @torch.no_grad()
    def extend(self, token_ids: Tensor, features: Mapping[str, Tensor]) -> None:
        draft, count, device = self._draft, token_ids.shape[0] - 1, self._cache.device
        if count < 1:
            raise ValueError("extend needs at least one verified position")
        self._reserve(self._length + count + draft.shape.block_size)
        context_nH = draft.join_features(features[AUX_HIDDEN_STATES].to(device))
        angles = self._angles(self._length, count)
        for number, (layer, _) in enumerate(draft.decoder_layers()):
            self._write(number, self._length, layer.project_context(context_nH, self._folded[number], angles))
        self._length += count
        self._bonus_1 = token_ids[-1:].to(device)

    def _visible(self, window: int | None) -> Tensor | None:
        """bool [K, length + K]: what the block's slots see in a sliding layer; None where they see everything."""
        if window is None:
            return None
        size = self._draft.shape.block_size
        query = torch.arange(self._length, self._length + size, device=self._cache.device).unsqueeze(1)
        key = torch.arange(self._length + size, device=query.device)
        own = key >= self._length
        return torch.where(own, key <= query, key > query - window)

    def _block_states(self, bonus_1: Tensor, slots: slice) -> Tensor:
        """What the head reads at some slots of the block that begins with the bonus token: [slots, H]."""
        draft, start = self._draft, self._length
        size, layers = draft.shape.block_size, draft.decoder_layers()
        state = draft.embed_blocks(bonus_1)
        angles = self._angles(start, size)
        for number, (layer, window) in enumerate(layers):
            query, key, value = layer.project_slots(state, self._folded[number], angles)
            self._write(number, start, (key, value))
            keys, values = self._cache[number, :, :, : start + size].unsqueeze(1)
            attended = functional.scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=self._visible(window), enable_gqa=True
            )[0].transpose(0, 1)
            if number == len(layers) - 1:
                state, attended = state[slots], attended[slots]
            state = layer.finish(state, attended, self._folded[number])
        normed: Tensor = draft.norm(state)
        return normed

    def _require_bonus(self) -> Tensor:
        if self._bonus_1 is None:
            raise ValueError("propose needs an extend before it")
        return self._bonus_1

    @torch.no_grad()
    def propose(self, max_tokens: int) -> Tensor:
        count = min(max_tokens, self._max_draft_tokens)
        states = self._block_states(self._require_bonus(), slice(1, 1 + count))
        return self._draft.target_head.logits(states).argmax(-1)
