# SPDX-License-Identifier: Apache-2.0
"""The map between the target's vocabulary and a smaller draft vocabulary.

Legend: V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_core.contracts import DataError


@dataclass(frozen=True, slots=True)
class VocabMap:
    """Which target tokens the draft can say.

    :param t2d: bool [V]; true where the token is in the draft vocabulary.
    :param d2t: int64 [W]; offsets: ``target_id = draft_id + d2t[draft_id]``.
    """

    t2d: Tensor
    d2t: Tensor

    @classmethod
    def full(cls, vocab_size: int) -> VocabMap:
        """Every target token, in order."""
        return cls(torch.ones(vocab_size, dtype=torch.bool), torch.zeros(vocab_size, dtype=torch.int64))

    @classmethod
    def from_counts(cls, counts: Tensor, size: int) -> VocabMap:
        """The ``size`` most frequent tokens; ties go to the smaller id, unused ids fill what is left, smallest first.

        :param counts: int64 [V], how often each token is trained.
        :raises DataError: nothing was counted, or the draft vocabulary is larger than the target's.
        """
        vocab_size = counts.shape[0]
        if size > vocab_size:
            raise DataError(f"a draft vocabulary of {size} does not fit the target's of {vocab_size}")
        if not bool(counts.any()):
            raise DataError("no trained token was counted, so there is no draft vocabulary to choose")
        # A stable sort keeps equal counts (zeros included) in id order: both rules above in one.
        kept = torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
        t2d = torch.zeros(vocab_size, dtype=torch.bool)
        t2d[kept] = True
        return cls(t2d, kept - torch.arange(size))

    @property
    def target_ids(self) -> Tensor:
        """The draft vocabulary as target token ids, ascending: int64 [W]."""
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def check(self) -> None:
        """:raises DataError: ``t2d`` and ``d2t`` do not describe one vocabulary."""
        ids = self.target_ids
        inside = bool(((ids >= 0) & (ids < self.t2d.shape[0])).all())
        if not inside or not torch.equal(self.t2d.nonzero().flatten(), ids):
            raise DataError("t2d and d2t do not describe the same draft vocabulary")
