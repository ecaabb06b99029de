# SPDX-License-Identifier: Apache-2.0
"""Looks into the write-ahead log that a killed process left beside its ledger, before SQLite recovers it.

SQLite takes from the log what comes before the first frame whose checksum is wrong and drops the rest without a word:
right where a kill or a power cut tore the last transaction, and wrong where a disk altered a byte in the middle, for
then whatever was recorded later is forgotten. The two differ in how many transactions are dropped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from specforge_core.contracts.files import open_regular

# Section 4 of https://www.sqlite.org/fileformat2.html. A frame with a database size ends a transaction.
_HEADER = struct.Struct(">8I")  # magic, version, page size, sequence, two salts, two checksums
_FRAME = struct.Struct(">6I")  # page, database size, two salts, two checksums
_CHECKSUMMED = 8
_WORD_ORDERS = {0x377F0682: "<", 0x377F0683: ">"}
_PAGE_SIZES = {1 << power for power in range(9, 17)}


def find_fault(wal: Path) -> str | None:
    """What is wrong with the log, if transactions would be dropped that had been recorded; None where there is no log.

    A fault in the last transaction is none: it looks like one that was never finished.

    :raises OSError: the log cannot be read.
    """
    try:
        descriptor = open_regular(wal, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        header = file.read(_HEADER.size)
        if os.fstat(file.fileno()).st_size < _HEADER.size + _FRAME.size:
            return None
        magic, _, page_size, _, *salts, first, second = _HEADER.unpack(header)
        order = _WORD_ORDERS.get(magic, "<")
        sums = _add_up(header[:-_CHECKSUMMED], order, (0, 0))
        if magic not in _WORD_ORDERS or page_size not in _PAGE_SIZES or sums != (first, second):
            return "its write-ahead log has an altered header"
        dropped = 0
        is_whole = True
        for frame, page in _frames(file, page_size):
            _, database_size, *own_salts, first, second = _FRAME.unpack(frame)
            if is_whole and own_salts == salts:
                sums = _add_up(frame[:_CHECKSUMMED] + page, order, sums)
                is_whole = sums == (first, second)
            is_whole = is_whole and own_salts == salts
            dropped += not is_whole and own_salts == salts and database_size > 0
        return f"its write-ahead log was altered, {dropped} transactions before its end" if dropped > 1 else None


def _frames(file: BinaryIO, page_size: int) -> Iterator[tuple[bytes, bytes]]:
    while len(content := file.read(_FRAME.size + page_size)) == _FRAME.size + page_size:
        yield content[: _FRAME.size], content[_FRAME.size :]


def _add_up(content: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    """SQLite's checksum of ``content``, going on from ``sums``."""
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    one, two = sums
    for even, odd in zip(words[::2], words[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return one, two
