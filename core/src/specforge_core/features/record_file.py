# SPDX-License-Identifier: Apache-2.0
"""Append-only files of checked records, written by one process and read by others while they grow.

A record is one line: a letter for its kind, a checksum, a JSON value, a newline. A line without its newline was not
written to its end, or not yet: it is never parsed, and whoever reopens the file to append cuts it off.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from specforge_core.contracts import ChannelError
from specforge_core.contracts.files import sync_directory
from specforge_core.features.file_lock import is_locked, lock_domain, lock_file

_LOCK_SECONDS = 1.0
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True)
_DECODER = json.JSONDecoder()
_READ_BYTES = 1 << 18
_GLANCE_BYTES = 1 << 12
_PREFIX_BYTES = len("R 00000000 ")


def frame(kind: str, body: object) -> bytes:
    """One record as it stands in the file."""
    text = _ENCODER.encode(body).encode("ascii")
    return b"%s %08x %s\n" % (kind.encode("ascii"), _checksum(kind, text), text)


def _checksum(kind: str, text: bytes) -> int:
    return zlib.crc32(text, ord(kind))


class Record(NamedTuple):
    """A complete line of a record file, not yet checked."""

    path: Path
    offset: int
    line: bytes

    @property
    def kind(self) -> str:
        return chr(self.line[0]) if self.line else ""

    def body(self) -> Any:
        """The record's value.

        :raises ChannelError: naming file and offset; the line is not what ``frame`` makes.
        """
        text = self.line[_PREFIX_BYTES:]
        if self.line[:_PREFIX_BYTES] != b"%s %08x " % (self.line[:1], _checksum(self.kind or "?", text)):
            raise self.malformed("its checksum does not match")
        try:
            value, end = _DECODER.raw_decode(text.decode("ascii"))
        except ValueError as error:
            raise self.malformed(str(error)) from error
        if end != len(text):
            raise self.malformed("more than one value")
        return value

    def malformed(self, why: str) -> ChannelError:
        """The error for a record that was written whole and yet cannot be understood."""
        return ChannelError(
            f"malformed record: {why}",
            where=f"{self.path}, offset {self.offset}",
            hint="the file was changed or written by another version; capture into a new directory",
        )


class RecordTail:
    """Reads what was appended since it was last asked; the cost is that of the new records."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._offset = 0
        self.owner = OwnerView(self._file)

    @property
    def offset(self) -> int:
        """Where the first record that was not read begins."""
        return self._offset

    def read(self) -> list[Record]:
        """The next completed records, some :data:`_READ_BYTES` of them; none once everything complete was read."""
        rest = b""
        while chunk := os.pread(self._file.fileno(), _READ_BYTES, self._offset + len(rest)):
            *lines, rest = (rest + chunk).split(b"\n")
            if lines:
                return list(self._take(lines))
        return []

    def _take(self, lines: list[bytes]) -> Iterator[Record]:
        for line in lines:
            yield Record(self.path, self._offset, line)
            self._offset += len(line) + 1

    def close(self) -> None:
        self._file.close()


class OwnerView:
    """What can be seen of the process that keeps a record file open, without reading the file."""

    def __init__(self, file: IO[bytes]) -> None:
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

    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._file.fileno()).st_size

    def last_kind(self) -> str:
        """The kind of the last completed record; empty where there is none."""
        end = _last_newline(self._file, self.size())
        begin = _last_newline(self._file, end - 1) if end else 0
        return os.pread(self._file.fileno(), 1, begin).decode("latin-1") if end else ""


def _last_newline(file: IO[bytes], end: int) -> int:
    """The offset after the last newline before ``end``; 0 where there is none."""
    while end > 0:
        begin = max(0, end - _GLANCE_BYTES)
        newline = os.pread(file.fileno(), end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def append_whole(file: IO[bytes], content: bytes, *, size: int, durable: bool) -> int:
    """Append to a file of ``size`` bytes, all or nothing; its new size.

    :raises ChannelError: no room on the disk; the file is as it was.
    """
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
        if durable:
            os.fdatasync(file.fileno())
    except OSError as error:
        os.ftruncate(file.fileno(), size)
        hint = "free space there" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        raise ChannelError(f"cannot be appended to: {error.strerror}", where=str(file.name), hint=hint) from error
    return size + len(content)


class RecordAppender:
    """Appends records to a file that it keeps locked until it is closed.

    :raises ChannelError: another process, or another appender here, has the file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        created = not path.exists()
        self._file = path.open("ab", buffering=0)
        if not lock_file(self._file, seconds=_LOCK_SECONDS):
            self._file.close()
            raise ChannelError(
                "somebody else is writing this file", where=str(path), hint="give every capture process its own name"
            )
        if created:
            sync_directory(path.parent)
        self._size = self._cut_torn_record()

    def _cut_torn_record(self) -> int:
        """Cut off what a process that died in mid-append left after the last newline."""
        size = os.fstat(self._file.fileno()).st_size
        with self.path.open("rb", buffering=0) as file:
            end = _last_newline(file, size)
        if end != size:
            os.ftruncate(self._file.fileno(), end)
        return end

    def append(self, frames: Sequence[bytes], *, durable: bool) -> None:
        """Append records as one piece, all or none, and sync them once where they must outlive the machine.

        :raises ChannelError: no room on the disk; the file is as it was.
        """
        self._size = append_whole(self._file, b"".join(frames), size=self._size, durable=durable)

    def rename(self, path: Path) -> None:
        """Give the file its name, once what it begins with is written."""
        self.path = self.path.rename(path)

    @property
    def domain(self) -> str:
        """Who sees the lock: see ``lock_domain``."""
        return lock_domain(self._file)

    def beat(self) -> None:
        """Show those who do not see the lock that this process lives."""
        os.utime(self._file.fileno())

    def close(self) -> None:
        self._file.close()
