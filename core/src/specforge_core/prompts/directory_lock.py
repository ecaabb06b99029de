# SPDX-License-Identifier: Apache-2.0
"""One preparation of a directory at a time: both halves of a run ask for the same prompts when they start.

The second waits for the first and finds the work done. It waits for as long as the holder shows life: a thread of the
holder's writes into the lock file, every second, how far the work is. A holder that is stopped writes nothing, and is
given up after a deadline. The lock goes with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specforge_core.contracts import DataError, DeadlineExceeded, Progress
from specforge_core.contracts.files import open_regular

_POLL_SECONDS = 0.1
"""Preparing takes seconds to hours; a tenth of one more is not noticed."""
_BEAT_SECONDS = 1.0
"""Others give up on a lock only after many missed beats."""
DEADLINE_SECONDS = 120.0
"""Without a heartbeat. A machine that is busy or short of memory may keep a thread waiting for some seconds, hardly for
a minute; a shared directory may show what another machine wrote some seconds later."""
_BEAT_BYTES = 128
"""Each heartbeat is padded to this and written at once, so that it replaces the one before."""


class LockHolder:
    """What the holder of the lock shows of its work."""

    def __init__(self) -> None:
        self.rows = 0
        self.total: int | None = None


@contextmanager
def locked(directory: Path, *, progress: Progress, deadline_seconds: float = DEADLINE_SECONDS) -> Iterator[LockHolder]:
    """Hold the lock of ``directory``, a file beside it, which stays.

    :param deadline_seconds: how long another holder may show no life.
    :raises DeadlineExceeded: another process holds it and shows no life.
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
        _acquire(file.fileno(), path, progress=progress, deadline_seconds=deadline_seconds)
        with _heartbeat(file.fileno()) as holder:
            yield holder


def _acquire(descriptor: int, path: Path, *, progress: Progress, deadline_seconds: float) -> None:
    seen, since = b"", time.monotonic()
    while not _try_lock(descriptor):
        beat = _read(descriptor)
        if beat != seen:
            seen, since = beat, time.monotonic()
        progress.waiting(f"another process that prepares the same prompts{_describe(beat)}")
        if time.monotonic() - since > deadline_seconds:
            raise DeadlineExceeded(
                f"another process prepares the same prompts and has shown no life for {deadline_seconds:.0f} s",
                where=str(path),
                hint=_hint(beat),
            )
        time.sleep(_POLL_SECONDS)
    progress.waiting(None)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _heartbeat(descriptor: int) -> Iterator[LockHolder]:
    holder, ended = LockHolder(), threading.Event()
    thread = threading.Thread(target=_beat, args=(descriptor, holder, ended), name="prompts-lock", daemon=True)
    thread.start()
    try:
        yield holder
    finally:
        ended.set()
        thread.join()


def _beat(descriptor: int, holder: LockHolder, ended: threading.Event) -> None:
    count = time.time_ns()  # unlike that of any holder before
    while True:
        shown = {"pid": os.getpid(), "beat": count, "rows": holder.rows, "total": holder.total}
        with suppress(OSError):  # a full disk is said by whoever writes prompts there
            os.pwrite(descriptor, json.dumps(shown).encode().ljust(_BEAT_BYTES), 0)
        count += 1
        if ended.wait(_BEAT_SECONDS):
            return


def _read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, _BEAT_BYTES, 0)
    except OSError:
        return b""


def _fields(beat: bytes) -> dict[str, object]:
    try:
        found = json.loads(beat)
    except ValueError:  # another version's lock, or a heartbeat that is just being written
        return {}
    return found if isinstance(found, dict) else {}


def _describe(beat: bytes) -> str:
    fields = _fields(beat)
    rows, total = fields.get("rows"), fields.get("total")
    if type(rows) is not int or not rows:
        return ""
    return f": {rows} rows of {total}" if type(total) is int else f": {rows} rows"


def _hint(beat: bytes) -> str:
    pid = _fields(beat).get("pid")
    return f"continue or end process {pid}" if type(pid) is int else "end that process"
