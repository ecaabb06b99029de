# SPDX-License-Identifier: Apache-2.0
"""What stores and channels are constructed with, besides their own section of the run file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PartContext:
    """What a store or channel is told about the run it serves.

    :param run_id: the same in every process of one run; a shared service keeps runs apart by it.
    :param directory: where the part keeps what it keeps on disk, unless its section says otherwise.
    :param token: the shared secret, or None. A store or a shared service that was first used with one lets nobody in
        without it (``AccessDenied``). Signing and checking refs is not the parts' affair.
    """

    run_id: str
    directory: Path
    token: str | None = None
