# SPDX-License-Identifier: Apache-2.0
"""Prompts in an epoch's order, read one at a time: what the capture loop walks through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from specforge_core.contracts import Prompt


class OrderedPrompts(Sequence[Prompt]):
    """A view of ``prompts`` in ``order`` (indices)."""

    def __init__(self, prompts: Sequence[Prompt], order: Sequence[int]) -> None:
        self._prompts = prompts
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._prompts[i] for i in self._order[index]]
        return self._prompts[self._order[index]]
