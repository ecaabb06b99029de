# SPDX-License-Identifier: Apache-2.0
"""One preparation of a directory at a time: both halves of a run ask for the same prompts when they start.

The second waits for the first and finds the work done. The lock goes with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge_core.contracts import DataError, DeadlineExceeded, Progress
from specforge_core.contracts.files import open_regular

_POLL_SECONDS = 0.1
DEADLINE_SECONDS = 3600.0


@contextmanager
def locked(directory: Path, *, progress: Progress, deadline_seconds: float = DEADLINE_SECONDS) -> Iterator[None]:
    """Hold the lock of ``directory``, a file beside it, which stays.

    :raises DeadlineExceeded: another process held it all the while.
    :raises DataError: the place cannot be written to.
    """
    path = directory.parent / f".{directory.name}.lock"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise DataError(
            f"prepared prompts cannot be written: {error.strerror}",
            where=str(directory),
            hint="correct the permissions there, or choose another run directory",
        ) from error
    with open(descriptor, "rb") as file:
        began = time.monotonic()
        while not _try_lock(file.fileno()):
            progress.waiting("another process that prepares the same prompts")
            if time.monotonic() - began > deadline_seconds:
                raise DeadlineExceeded(
                    f"waited {deadline_seconds:.0f} s for another process that prepares the same prompts",
                    where=str(path),
                    hint="end that process",
                )
            time.sleep(_POLL_SECONDS)
        progress.waiting(None)
        yield


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
