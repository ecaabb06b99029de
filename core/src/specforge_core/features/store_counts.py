# SPDX-License-Identifier: Apache-2.0
"""What a directory of features holds and which generation comes next: one small file that all its processes share.

Whoever holds its lock may change the directory; locks are held for a few system calls, never while a sample is written.
A process may be killed between a change and its record: changes are made in such an order that the record then says
too much, never too little, and whoever opens the store next counts again.

Generations grow over the whole directory, so that a sample that is deleted leaves nothing behind and the next one of
its id has a higher generation all the same. The record reaches the disk only now and then, so a power cut may take it
back; therefore generations are reserved on disk in blocks, and every process that opens the store begins a new block.

A record that is not there, not whole, or that nobody can have meant is lost: who finds it so counts again.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from specforge_core.contracts import StoreError
from specforge_core.contracts.files import open_regular
from specforge_core.features.file_lock import lock_file, unlock_file
from specforge_core.features.sample_file import MAX_GENERATION

_FILE_NAME = ".counts"
_RECORD = struct.Struct("<4q")
_LOCK_SECONDS = 60.0
_BLOCK = 1 << 16
_MOST = MAX_GENERATION // 2
"""The highest number that is believed, of generations, samples and bytes alike: as many again fit above it."""


@dataclass(slots=True)
class Counts:
    """The shared record, in the hands of who holds its lock. What is changed in it is kept when the lock is given up.

    :param generation: the last one given out.
    :param reserved: no generation above this one was given out before it was on disk that it may be.
    :param nbytes: of samples, and of what is being written.
    :param lost: the record was: nothing in it is known until ``recount``.
    """

    generation: int
    reserved: int
    samples: int
    nbytes: int
    lost: bool
    _descriptor: int

    def recount(self, *, samples: int, nbytes: int) -> None:
        """What was found in the directory. Where a record was lost that had given out generations, they go on above all
        of them: nobody puts a thousand samples a second for as long as there have been seconds."""
        if self.lost and samples:
            self.generation = self.reserved = max(self.generation, int(1000 * self.clock()))
        self.samples, self.nbytes, self.lost = samples, nbytes, False

    @contextmanager
    def announced(self, *, samples: int = 0, nbytes: int = 0) -> Iterator[None]:
        """Count more before the directory holds more, and no longer where that fails."""
        self.samples, self.nbytes = self.samples + samples, self.nbytes + nbytes
        self._save()
        try:
            yield
        except BaseException:
            self.samples, self.nbytes = self.samples - samples, self.nbytes - nbytes
            raise

    def clock(self) -> float:
        """Now, by the clock of the file system; seconds since the epoch."""
        os.utime(self._descriptor)
        return os.fstat(self._descriptor).st_mtime

    def _save(self) -> None:
        # A file that was planted can be larger than any disk, and two of them larger than fits.
        record = _RECORD.pack(self.generation, self.reserved, self.samples, min(self.nbytes, 2 * _MOST))
        os.pwrite(self._descriptor, record, 0)

    def next_generation(self, above: int) -> int:
        """A generation above every one given out before, and above ``above``."""
        self.generation = max(self.generation, above) + 1
        if self.generation > self.reserved:
            self.reserved = self.generation + _BLOCK
            self._save()
            os.fsync(self._descriptor)
        return self.generation

    def begin_block(self) -> None:
        """Skip what may have been given out before a power cut."""
        self.generation = max(self.generation, self.reserved)


class StoreCounts:
    """The counts of one directory. Every process, and every thread, has them to itself while it holds the lock."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE_NAME
        self._turn = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[Counts]:
        """
        :raises StoreError: another process kept the lock for a minute.
        :raises OSError: the directory is not there, or cannot be written.
        """
        with self._turn, open(open_regular(self._path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
            if not lock_file(file, seconds=_LOCK_SECONDS):
                raise StoreError(
                    f"another process kept the store locked for {_LOCK_SECONDS:g} s", where=str(self._path)
                )
            counts = _parse(os.pread(file.fileno(), _RECORD.size, 0), file.fileno())
            try:
                yield counts
            finally:
                counts._save()
                unlock_file(file)  # a process that was forked meanwhile has the file open too

    def read(self) -> tuple[int, int] | None:
        """Samples and bytes, without waiting for anybody; None where the record is lost."""
        try:
            with open(open_regular(self._path, os.O_RDONLY), "rb", buffering=0) as file:
                counts = _parse(os.pread(file.fileno(), _RECORD.size, 0), -1)
        except FileNotFoundError:
            return None
        return None if counts.lost else (counts.samples, counts.nbytes)


def _parse(record: bytes, descriptor: int) -> Counts:
    if len(record) == _RECORD.size:
        generation, reserved, samples, nbytes = _RECORD.unpack(record)
        if 0 <= generation <= reserved <= _MOST and 0 <= samples <= _MOST and 0 <= nbytes <= _MOST:
            return Counts(generation, reserved, samples, nbytes, False, descriptor)
    return Counts(0, 0, 0, 0, True, descriptor)
