# SPDX-License-Identifier: Apache-2.0
"""Tensors' memory in pieces small enough to stay in the cache between being copied and being hashed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Buffer

_PIECE_BYTES = 1 << 19


def cut(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The buffers' bytes in order, as groups of pieces that are handled together: small ones gathered, big ones cut."""
    group: list[memoryview] = []
    room = _PIECE_BYTES
    for buffer in buffers:
        for begin in range(0, buffer.nbytes, _PIECE_BYTES):
            piece = buffer[begin : begin + _PIECE_BYTES]
            if piece.nbytes > room and group:
                yield group
                group, room = [], _PIECE_BYTES
            group.append(piece)
            room -= piece.nbytes
    if group:
        yield group


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, uncopied and writable."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))
