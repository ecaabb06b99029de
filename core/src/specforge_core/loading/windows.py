# SPDX-License-Identifier: Apache-2.0
"""Windows, and how one is cut: dealt to ranks, then cut into micro-batches. Pure functions over refs.

A window is one optimizer step. It follows prompt order and never crosses an epoch, so the last of an epoch may be
short. How it is cut changes speed and nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from specforge_core.contracts import Batch, SampleRef

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Window:
    """One optimizer step's samples, ready to train.

    :param index: windows before it; equal to the number of finished optimizer steps when it is trained.
    :param micro_batches: this rank's share, collated.
    :param refs: the whole window's, over all ranks, in prompt order.
    :param num_tokens: tokens of the whole window, untrained positions included.
    :param waited_seconds: how long the trainer stood still for it.
    """

    index: int
    epoch: int
    micro_batches: Sequence[Batch]
    refs: Sequence[SampleRef]
    num_tokens: int
    waited_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """Which windows a run consists of and how each is cut."""

    num_prompts: int
    global_batch_size: int
    micro_batch_size: int
    epochs: int
    max_steps: int | None = None
    sort_by_length: bool = True
    rank: int = 0
    world_size: int = 1

    @property
    def windows_per_epoch(self) -> int:
        return math.ceil(self.num_prompts / self.global_batch_size)

    @property
    def total_windows(self) -> int:
        """Optimizer steps of the whole run."""
        windows = self.epochs * self.windows_per_epoch
        return windows if self.max_steps is None else min(windows, self.max_steps)

    def place(self, index: int) -> tuple[int, slice]:
        """The epoch of window ``index`` and its slice of that epoch's order."""
        epoch, window = divmod(index, self.windows_per_epoch)
        return epoch, slice(window * self.global_batch_size, (window + 1) * self.global_batch_size)

    def cut(self, refs: Sequence[SampleRef]) -> list[list[SampleRef]]:
        """This rank's micro-batches of a window."""
        mine = deal(refs, self.world_size)[self.rank]
        if self.sort_by_length:
            mine = by_length(mine)
        share = math.ceil(len(refs) / self.world_size)
        return split(mine, math.ceil(share / self.micro_batch_size))


def by_length(refs: Sequence[SampleRef]) -> list[SampleRef]:
    """Longest first (so that peak memory shows at once); equals stay in order."""
    return sorted(refs, key=lambda ref: -ref.num_tokens)


def deal(refs: Sequence[SampleRef], world_size: int) -> list[list[SampleRef]]:
    """Deal a window to ranks: equal counts (to one), nearly equal tokens, each share in the window's order.

    The longest remaining sample goes to the rank with the fewest tokens that still has room.
    """
    if world_size == 1:
        return [list(refs)]
    room = [len(refs) // world_size + (rank < len(refs) % world_size) for rank in range(world_size)]
    tokens = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for index in sorted(range(len(refs)), key=lambda i: -refs[i].num_tokens):
        rank = min((r for r in range(world_size) if len(shares[r]) < room[r]), key=lambda r: (tokens[r], r))
        shares[rank].append(index)
        tokens[rank] += refs[index].num_tokens
    return [[refs[index] for index in sorted(share)] for share in shares]


def split(refs: Sequence[T], parts: int) -> list[list[T]]:
    """Cut into ``parts`` runs of equal length (to one), so that every rank makes the same number of passes.

    Fewer where there are fewer refs than parts: a micro-batch is never empty.
    """
    parts = min(parts, len(refs))
    bounds = [len(refs) * part // parts for part in range(parts + 1)] if parts else []
    return [list(refs[start:end]) for start, end in itertools.pairwise(bounds)]
