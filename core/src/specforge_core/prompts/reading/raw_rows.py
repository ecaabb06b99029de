# SPDX-License-Identifier: Apache-2.0
"""One row as a file has it, and how long it may be: what every format gives, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specforge_core.contracts import DataError

MAX_ROW_BYTES = 4 << 20
"""Of one row: a million tokens, more than any target attends to. Encoding takes 130 bytes for each byte of text."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    :param number: its line, or its place in the file, from 1.
    :param content: the row; empty where there is an error.
    :param error: why it cannot be read, where the rows after it can.
    :param size: about so many bytes, where it is known.
    :param unread: columns of the file that are not read, because nothing is made of them.
    """

    number: int
    content: Mapping[str, Any] = field(default_factory=dict)
    error: DataError | None = None
    size: int = 0
    unread: frozenset[str] = frozenset()


def too_long(where: str) -> DataError:
    return DataError(
        f"is longer than {MAX_ROW_BYTES} bytes",
        where=where,
        hint="one JSON object per line; split what is longer: a prompt is cut at data.max_length tokens anyway",
    )
