# SPDX-License-Identifier: Apache-2.0
"""A record file that several processes append to, one at a time, each having read what is there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from specforge_core.contracts import ChannelError
from specforge_core.contracts.files import make_directory
from specforge_core.features.file_lock import lock_domain, lock_file, unlock_file
from specforge_core.features.record_file import Record, RecordTail, append_whole, open_to_append


class SharedLog:
    """``read`` and ``append`` belong inside ``locked``.

    :raises ChannelError: the file cannot be written.
    """

    def __init__(self, path: Path, *, lock_seconds: float) -> None:
        self._path = path
        self._lock_seconds = lock_seconds
        self._thread_lock = threading.Lock()
        self._closed = False
        try:
            make_directory(path.parent)
            self._file = open_to_append(path)
        except OSError as error:
            raise ChannelError(f"cannot be written: {error.strerror}", where=str(path)) from error
        self._tail = RecordTail(path)

    @property
    def domain(self) -> str:
        """Who sees the locks taken here: see ``lock_domain``."""
        return lock_domain(self._file)

    @contextmanager
    def locked(self, *, before: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Alone with the file.

        :param before: done with no other thread of this object, before the file is locked; it may ``read``.
        :raises ChannelError: it was closed, or others kept it locked for too long.
        """
        with self._thread_lock:
            if self._closed:
                raise ChannelError("was closed here", where=str(self._path))
            before()
            if not lock_file(self._file, seconds=self._lock_seconds):
                raise ChannelError(
                    f"another process has kept it locked for {self._lock_seconds:.0f} s",
                    where=str(self._path),
                    hint="see whether a process of this run is stopped or hangs on its file system",
                )
            try:
                yield
            finally:
                unlock_file(self._file)

    def read(self) -> Iterator[Record]:
        """What was appended since this was last asked."""
        while records := self._tail.read():
            yield from records

    def append(self, frames: Sequence[bytes], *, version: bytes, durable: bool = False) -> None:
        """Append after everything was read. An empty file gets ``version`` first.

        :param durable: with everything before it, it outlives the machine.

        :raises ChannelError: no room on the disk; the file is as it was.
        """
        end = self._tail.offset
        if os.fstat(self._file.fileno()).st_size > end:  # whoever wrote this died in mid-append
            os.ftruncate(self._file.fileno(), end)
        append_whole(self._file, b"".join([*([] if end else [version]), *frames]), size=end, durable=durable)

    def close(self) -> None:
        with self._thread_lock:
            self._closed = True
            self._file.close()
            self._tail.close()
