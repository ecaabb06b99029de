# SPDX-License-Identifier: Apache-2.0
"""The two sides of speculative decoding: a target that verifies and a drafter that proposes.

Both keep a key-value cache for one sequence. The loop in ``specforge_core.decoding`` drives them and knows neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetStep:
    """What one target forward pass over n new tokens gives.

    :param logits: [n, V], for the token after each of the n.
    :param features: the requested features of the n positions (``aux_hidden_states`` [n, L, H] and so on).
    """

    logits: Tensor
    features: Mapping[str, Tensor]


class TargetDecoder(ABC):
    """A target with the key-value cache of one sequence."""

    @abstractmethod
    def forward(self, token_ids: Tensor) -> TargetStep:
        """Append ``token_ids`` (int64 [n]) to the cache and return their logits and features."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens."""


class Drafter(ABC):
    """A draft with the key-value cache of one sequence."""

    @property
    @abstractmethod
    def max_draft_tokens(self) -> int:
        """How many tokens one ``propose`` can return at most."""

    @abstractmethod
    def reset(self) -> None:
        """Begin a new sequence."""

    @abstractmethod
    def extend(self, token_ids: Tensor, features: Mapping[str, Tensor]) -> None:
        """Take in n newly verified positions.

        :param token_ids: int64 [n + 1]: the tokens at those positions, then the bonus token, which the target has
            emitted but not yet processed (so it has no features).
        :param features: the target's features at the n positions, each [n, ...].
        """

    @abstractmethod
    def propose(self, max_tokens: int) -> Tensor:
        """Guess what follows the bonus token: int64 [k], target token ids, ``k ≤ min(max_tokens, max_draft_tokens)``.

        May be called once after each ``extend``; what it caches for guessed tokens is dropped by the next ``extend``.
        """
