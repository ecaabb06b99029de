# SPDX-License-Identifier: Apache-2.0
"""Advisory locks: who holds one is alive. The kernel lets go of a dead process's locks, whatever killed it."""

from __future__ import annotations

import fcntl
import functools
import os
import time
from pathlib import Path
from typing import Protocol

_PAUSE_SECONDS = 0.002


class Opened(Protocol):
    """An open file, whatever kind of object it is."""

    def fileno(self) -> int: ...


def lock_file(file: Opened, *, seconds: float) -> bool:
    """Take the exclusive lock of an open file, waiting up to ``seconds``; it is held until the file is closed."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_PAUSE_SECONDS)


def unlock_file(file: Opened) -> None:
    """Let go of the lock of a file that stays open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(file: Opened) -> bool:
    """Whether somebody else holds the exclusive lock now."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def lock_domain(file: Opened) -> str:
    """Names one running kernel and one mounted file system: whoever gets the same name sees the file's locks.

    Empty where the kernel does not say which one it is; then nothing is known of who sees what.
    """
    boot = _boot_id()
    return boot and f"{boot}:{os.fstat(file.fileno()).st_dev}"


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def opened_by(domain: str) -> list[str | int]:
    """Who opened a file: host, process and lock domain, as it is recorded in the file."""
    return [os.uname().nodename, os.getpid(), domain]
