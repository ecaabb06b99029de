# SPDX-License-Identifier: Apache-2.0
"""Drafting for real: one sequence, key-value cache of verified positions, chain proposals.

What training calls unroll step k is the k-th guess here: the same state fed back, the same RoPE position, and keys of
earlier guesses that only this chain sees. Verified positions keep the keys of their first pass (made from the target's
own features); keys of guesses are dropped by the next ``extend``.

Legend: n new positions, L captured layers, A target hidden, P projected sizes, G key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES, Drafter
from specforge_core.modeling import QueryLayout, attend
from torch import Tensor

from specforge_eagle3.draft_model import Eagle3Draft

_GROWTH = 256  # positions: a full cache is copied once in so many tokens


class Eagle3Drafter(Drafter):
    """Greedy chain drafting.

    :param max_draft_tokens: longest chain; the draft was trained on ``ttt_steps`` of them.
    """

    def __init__(self, draft: Eagle3Draft, *, max_draft_tokens: int) -> None:
        self._draft = draft
        self._max_draft_tokens = max_draft_tokens
        shape = draft.shape
        empty = draft.fc.weight.new_empty(1, shape.num_key_value_heads, 0, shape.head_dim)
        self._keys, self._values = empty, empty.clone()
        with torch.no_grad():
            self._folded = draft.fold()
        self.reset()

    @property
    def max_draft_tokens(self) -> int:
        return self._max_draft_tokens

    def reset(self) -> None:
        self._length = 0
        self._state_1H: Tensor | None = None
        self._query_1ND: Tensor | None = None

    def _reserve(self, length: int) -> None:
        if length > self._keys.shape[2]:
            room = self._keys.shape[0], self._keys.shape[1], length + _GROWTH, self._keys.shape[3]
            for name in ("_keys", "_values"):
                old = getattr(self, name)
                new = old.new_empty(room)
                new[:, :, : self._length] = old[:, :, : self._length]
                setattr(self, name, new)

    def _angles(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(start, start + count, device=self._keys.device)
        return self._draft.rotary.at(positions, start + count)

    @torch.no_grad()
    def extend(self, token_ids: Tensor, features: Mapping[str, Tensor]) -> None:
        draft, count, end = self._draft, token_ids.shape[0] - 1, self._length + token_ids.shape[0] - 1
        if count < 1:
            raise ValueError("extend needs at least one verified position")
        token_ids = token_ids.to(self._keys.device)
        state_nH = draft.join_features(features[AUX_HIDDEN_STATES].to(self._keys.device))
        projected_nP = draft.project_tokens(token_ids[1:], self._folded) + draft.project_hidden(state_nH, self._folded)
        query, key, value = draft.split_heads(projected_nP, self._angles(self._length, count))
        self._reserve(end + self._max_draft_tokens)
        self._write(self._length, key, value)
        self._length = end
        self._state_1H, self._query_1ND = state_nH[-1:], query[-1:]

    def _write(self, start: int, key: Tensor, value: Tensor) -> None:
        self._keys[0, :, start : start + key.shape[0]] = key.transpose(0, 1)
        self._values[0, :, start : start + value.shape[0]] = value.transpose(0, 1)

    @torch.no_grad()
    def propose(self, max_tokens: int) -> Tensor:
        draft, guesses = self._draft, list[Tensor]()
        if self._state_1H is None or self._query_1ND is None:
            raise ValueError("propose needs an extend before it")
        state_1H, query_1ND = self._state_1H, self._query_1ND
        for step in range(min(max_tokens, self._max_draft_tokens)):
            end = self._length + step
            if step:
                projected = draft.project_tokens(guesses[-1], self._folded)
                projected = projected + draft.project_hidden(state_1H, self._folded)
                query_1ND, key, value = draft.split_heads(projected, self._angles(end - 1, 1))
                self._write(end - 1, key, value)
            layout = QueryLayout(batch=1, offset=end - 1, length=1)
            attended = attend(layout, query_1ND, self._keys[:, :, :end], self._values[:, :, :end])
            state_1H = draft.finish_layer(state_1H, attended, self._folded)
            logits_1W = draft.lm_head(draft.before_head(state_1H))
            guess_1 = logits_1W.argmax(-1)
            guesses.append(guess_1 + draft.d2t[guess_1])
        return torch.cat(guesses) if guesses else torch.empty(0, dtype=torch.int64)
