# SPDX-License-Identifier: Apache-2.0
"""A checksum that costs little beside copying: what tells a sample's bytes from those of a damaged disk.

Column sums of 64-bit words, over rows whose length is prime, so that pages and sectors that were exchanged, repeated or
blanked end in other columns; from piece to piece the sums are multiplied, so that the place of a piece counts too. What
is shorter than a row, and the sums at the end, go through CRC-32. It finds damage; it is no signature.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Buffer

_ROW_WORDS = 8191
_ROW_BYTES = 8 * _ROW_WORDS
_PIECE_BYTES = 8 * _ROW_BYTES  # stays in the cache between being copied and being summed
_FACTOR = 0x2545F4914F6CDD1D  # odd: a piece that differs makes a difference whatever follows
CHECKSUM_DIGITS = 8


class Checksum:
    """Of the pieces given to ``update``, in order; cut by :func:`cut`, or the checksum is another one."""

    def __init__(self) -> None:
        self._short = 0
        self._sums: Any = None

    def update(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            rows = piece.nbytes // _ROW_BYTES
            if rows:
                words = torch.frombuffer(piece, dtype=torch.int64, count=rows * _ROW_WORDS)
                # NumPy adds in this thread; torch would wake others for a millisecond's work.
                self._add(words.numpy().reshape(rows, _ROW_WORDS).sum(axis=0))
            if piece.nbytes > rows * _ROW_BYTES:
                self._short = zlib.crc32(piece[rows * _ROW_BYTES :], self._short)

    def _add(self, sums: Any) -> None:
        if self._sums is None:
            self._sums = sums
        else:
            self._sums *= _FACTOR
            self._sums += sums

    def hexdigest(self) -> str:
        """``CHECKSUM_DIGITS`` hexadecimal digits."""
        whole = self._short if self._sums is None else zlib.crc32(self._sums.tobytes(), self._short)
        return f"{whole:0{CHECKSUM_DIGITS}x}"


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
