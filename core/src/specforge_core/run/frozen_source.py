# SPDX-License-Identifier: Apache-2.0
"""What a strategy is given to construct its draft: the target's frozen weights and the training data's token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from specforge_core.contracts import DataError, TargetEngine, TargetInfo
from specforge_core.prompts.prompt_set import PromptSet

if TYPE_CHECKING:
    from torch import Tensor


class RunFrozenSource:
    """A :class:`~specforge_core.contracts.FrozenSource` over an engine and, where there is one, a prompt set."""

    def __init__(self, engine: TargetEngine, train_prompts: PromptSet | None) -> None:
        self._engine = engine
        self._train_prompts = train_prompts

    @property
    def info(self) -> TargetInfo:
        return self._engine.info

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        return self._engine.frozen_weights(names)

    def token_counts(self) -> Tensor:
        if self._train_prompts is None:
            raise DataError("token counts of the training data are needed, and no training data is at hand")
        return self._train_prompts.token_counts(self._engine.info.vocab_size)
