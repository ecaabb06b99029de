# SPDX-License-Identifier: Apache-2.0
"""A record file as others see it: opened when something is asked of it, and what shows of who keeps it."""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

from specforge_core.contracts import ChannelError
from specforge_core.contracts.files import open_regular
from specforge_core.features.file_lock import Opened, is_locked, lock_domain

MAX_RECORD_BYTES = 8 << 20
"""A batch of 4096 refs whose ids are as long as file names may be, in letters that JSON writes in twelve, has 6 MB."""

_READ_BYTES = 1 << 18
_GLANCE_BYTES = 1 << 12
_PLANTED = (errno.ELOOP, errno.EINVAL, errno.ENXIO)


class FollowedFile:
    """A file that is opened when something is asked of it, and may be let go of while nothing is expected of it.

    :raises ChannelError: it cannot be opened, or is no file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self.fileno()

    def fileno(self) -> int:
        if self._file is None:
            try:
                self._file = FileIO(open_regular(self._path, os.O_RDONLY))
            except OSError as error:
                hint = "find out who put it there; remove it" if error.errno in _PLANTED else ""
                raise ChannelError(f"cannot be read: {error.strerror}", where=str(self._path), hint=hint) from error
        return self._file.fileno()

    def state(self) -> tuple[int, ...]:
        """Unlike what it was before where the file was written to, or touched; empty where it is not there."""
        try:
            status = os.lstat(self._path) if self._file is None else os.fstat(self._file.fileno())
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class OwnerView:
    """What can be seen of the process that keeps a record file open, without reading the file."""

    def __init__(self, file: Opened) -> None:
        self._file = file

    def is_locked(self) -> bool:
        """Whether it is alive, as far as the file system tells."""
        return is_locked(self._file)

    def sees_locks_of(self, domain: str) -> bool:
        """Whether a process that found itself in ``domain`` (see ``lock_domain``) cannot hold the file unseen."""
        return bool(domain) and lock_domain(self._file) == domain

    def heartbeat_ns(self) -> int:
        """When the file was last written or touched, by the clock of whoever keeps it."""
        return os.fstat(self._file.fileno()).st_mtime_ns

    def device(self) -> int:
        """The file system that it is on."""
        return os.fstat(self._file.fileno()).st_dev

    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file.fileno()).st_size

    def last_kind(self) -> str:
        """The kind of the last completed record; empty where there is none."""
        end = last_newline(self._file, self.size())
        begin = last_newline(self._file, end - 1) if end else 0
        return os.pread(self._file.fileno(), 1, begin or 0).decode("latin-1") if end else ""


def last_newline(file: Opened, end: int) -> int | None:
    """The offset after the last newline before ``end``, 0 where there is none; None where a record has no end."""
    lowest = max(0, end - MAX_RECORD_BYTES - 1)
    nbytes = _GLANCE_BYTES
    while end > lowest:
        begin = max(lowest, end - nbytes)
        newline = os.pread(file.fileno(), end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end, nbytes = begin, _READ_BYTES
    return None if lowest else 0
