# SPDX-License-Identifier: Apache-2.0
"""A target whose next token is always the last one plus one, and drafters that know it to a chosen depth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from specforge_core.contracts import Drafter, TargetDecoder, TargetStep
from torch import Tensor

VOCAB_SIZE = 32


class CountingTarget(TargetDecoder):
    """Counts up modulo its vocabulary. ``wrong_after``: blocks verified at or beyond that length come out wrong."""

    def __init__(self, *, wrong_after: int | None = None) -> None:
        self._cache: list[int] = []
        self._wrong_after = wrong_after

    def forward(self, token_ids: Tensor) -> TargetStep:
        self._cache += token_ids.tolist()
        following = (token_ids + 1) % VOCAB_SIZE
        if self._wrong_after is not None and len(token_ids) > 1 and len(self._cache) >= self._wrong_after:
            following = (token_ids + 2) % VOCAB_SIZE
        logits = torch.nn.functional.one_hot(following, VOCAB_SIZE).float()
        return TargetStep(logits, {"last_hidden_states": token_ids.float()[:, None]})

    def truncate(self, length: int) -> None:
        assert length <= len(self._cache)
        del self._cache[length:]


class ScriptedDrafter(Drafter):
    """Right at the first ``right_until`` positions of every proposal, wrong after that."""

    def __init__(self, *, right_until: int) -> None:
        self._right_until = right_until
        self._bonus = 0
        self.seen_tokens: list[int] = []
        self.seen_features: list[float] = []

    @property
    def max_draft_tokens(self) -> int:
        return 4

    def reset(self) -> None:
        self.seen_tokens, self.seen_features = [], []

    def extend(self, token_ids: Tensor, features: Mapping[str, Tensor]) -> None:
        rows = features["last_hidden_states"]
        assert len(rows) == len(token_ids) - 1
        self.seen_tokens += token_ids[:-1].tolist()
        self.seen_features += rows[:, 0].tolist()
        self._bonus = int(token_ids[-1])

    def propose(self, max_tokens: int) -> Tensor:
        right = [self._bonus + 1 + k if k < self._right_until else 0 for k in range(min(max_tokens, 4))]
        return torch.tensor(right) % VOCAB_SIZE


class EmptyDrafter(ScriptedDrafter):
    """Never has a guess."""

    def __init__(self) -> None:
        super().__init__(right_until=0)

    def propose(self, max_tokens: int) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)
