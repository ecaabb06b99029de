# SPDX-License-Identifier: Apache-2.0
"""Which keys a block's slots see: one rule, in the three forms attention wants it.

A slot sees the context strictly before its anchor and its whole block; in a sliding layer of window W only the context
from ``a + slot − (W − 1)`` on, and its block up to itself (DFlash, arXiv 2602.06036). Keys are the blocks' own slots,
then the packed context. The dense form is the rule over every query and key, for comparison; segments cut it into small
pieces over which a fused CPU kernel runs; FlexAttention takes the rule itself.

Legend: M blocks, K block size, R = M·K query rows, C packed context positions, Q rows of a segment, J its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SEGMENT_ROWS = 256
"""Query rows whose mask exists at a time: short segments skip the keys after their last anchor."""
_HIDDEN = -1e30
"""Added to scores of hidden keys; finite, so that a row that sees none stays finite."""

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def _mask_maker(*, compiled: bool) -> Callable[..., BlockMask]:
    """Compiled, the rule over all queries and keys never exists at once."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if compiled else create_block_mask


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring blocks of one sample: query rows, context keys, and their additive mask, fp32 [1, 1, Q, J]."""

    rows: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True)
class BlockLayout:
    """Where packed blocks stand in their samples.

    :param anchors_M: int64, position of each block's anchor; blocks of one sample are neighbours, by anchor.
    :param sample_M: int64, sample of each block.
    :param sample_C: int64, sample of each packed context position; ``position_C`` the position itself. A sample's
        context is packed from position 0 on.
    """

    block_size: int
    anchors_M: Tensor
    sample_M: Tensor
    sample_C: Tensor
    position_C: Tensor
    _flex: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        return self.anchors_M.shape[0] * self.block_size

    @property
    def num_context(self) -> int:
        return self.position_C.shape[0]

    @cached_property
    def slot_positions(self) -> Tensor:
        """int64 [R], anchor + slot; may pass the sample's end."""
        slots = torch.arange(self.block_size, device=self.anchors_M.device)
        return (self.anchors_M.unsqueeze(1) + slots).flatten()

    def rule(self, window: int | None) -> MaskRule:
        """``rule(batch, head, query, key)``: true where the query row sees the key."""
        context = torch.full_like(self.position_C, -1)
        block_R = torch.arange(self.num_rows, device=context.device) // self.block_size
        query_sample, query_anchor = (x.repeat_interleave(self.block_size) for x in (self.sample_M, self.anchors_M))
        query_position = self.slot_positions
        key_block = torch.cat([block_R, context])
        key_sample = torch.cat([query_sample, self.sample_C])
        key_position = torch.cat([query_position, self.position_C])

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            before = (key_block[key] < 0) & (key_sample[key] == query_sample[query])
            before = before & (key_position[key] < query_anchor[query])
            own = key_block[key] == block_R[query]
            if window is not None:
                before = before & (key_position[key] >= query_position[query] - (window - 1))
                own = own & (key_position[key] <= query_position[query])
            return before | own

        return sees

    def dense(self, window: int | None) -> Tensor:
        """bool [R, R + C]."""
        queries = torch.arange(self.num_rows, device=self.anchors_M.device).unsqueeze(1)
        keys = torch.arange(self.num_rows + self.num_context, device=self.anchors_M.device).unsqueeze(0)
        return self.rule(window)(queries, keys, queries, keys)

    def flex(self, window: int | None) -> BlockMask:
        """For FlexAttention; made once per batch and window."""
        if window not in self._flex:
            device, keys = self.anchors_M.device, self.num_rows + self.num_context
            make = _mask_maker(compiled=device.type == "cuda")
            self._flex[window] = make(self.rule(window), None, None, self.num_rows, keys, device=device)
        return self._flex[window]

    @cached_property
    def _runs(self) -> list[tuple[int, int, int, int, int]]:
        """(first block, end, where the sample's context is packed, smallest anchor, largest) of each segment."""
        anchors, samples = self.anchors_M.tolist(), self.sample_M.tolist()
        packed = torch.searchsorted(self.sample_C, self.sample_M).tolist()
        step = max(1, _SEGMENT_ROWS // self.block_size)
        runs, first = [], 0
        while first < len(anchors):
            end = first
            while end < min(first + step, len(anchors)) and samples[end] == samples[first]:
                end += 1
            runs.append((first, end, packed[first], min(anchors[first:end]), max(anchors[first:end])))
            first = end
        return runs

    def segments(self, window: int | None) -> Iterator[Segment]:
        """The context part of the rule, one piece at a time; blocks that see no context are left out."""
        for first, end, packed, least, most in self._runs:
            start = 0 if window is None else max(0, least - (window - 1))
            if start >= most:
                continue
            rows = slice(first * self.block_size, end * self.block_size)
            position_J = torch.arange(start, most)
            hidden_QJ = position_J >= self.anchors_M[first:end].repeat_interleave(self.block_size).unsqueeze(1)
            if window is not None:
                hidden_QJ |= position_J < self.slot_positions[rows].unsqueeze(1) - (window - 1)
            mask = torch.zeros(hidden_QJ.shape).masked_fill_(hidden_QJ, _HIDDEN)
            yield Segment(rows, slice(packed + start, packed + most), mask[None, None])
