# SPDX-License-Identifier: Apache-2.0
"""Append-only files of checked records, written by one process and read by others while they grow.

A record is one line: a letter for its kind, a checksum, a JSON value, a newline. A line without its newline was not
written to its end, or not yet: it is never parsed, and whoever reopens the file to append cuts it off.

Others may write into the directory: a file is opened where it is a file, and a line has an end or is an error.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from specforge_core.contracts import ChannelError
from specforge_core.contracts.files import open_regular, sync_directory
from specforge_core.features.file_lock import lock_domain, lock_file
from specforge_core.features.followed_file import MAX_RECORD_BYTES, FollowedFile, OwnerView, last_newline

_LOCK_SECONDS = 1.0
_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True)
_DECODER = json.JSONDecoder()
_READ_BYTES = 1 << 18
_PREFIX_BYTES = len("R 00000000 ")
_TOO_LONG = f"more than {MAX_RECORD_BYTES} bytes without an end"


def frame(kind: str, body: object) -> bytes:
    """One record as it stands in the file.

    :raises ChannelError: it would be longer than what is read.
    """
    text = _ENCODER.encode(body).encode("ascii")
    if len(text) > MAX_RECORD_BYTES - _PREFIX_BYTES:
        raise ChannelError(
            f"a record of {len(text)} bytes, above {MAX_RECORD_BYTES}", hint="give prompts ids that are shorter"
        )
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
        except (ValueError, RecursionError) as error:
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
    """Reads what was appended since it was last asked; the cost is that of the new records.

    :raises ChannelError: the file cannot be opened, or is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = FollowedFile(path)
        self._offset = 0
        self._read_to_its_end: tuple[int, ...] = ()
        self.owner = OwnerView(self._file)

    @property
    def offset(self) -> int:
        """Where the first record that was not read begins."""
        return self._offset

    @property
    def has_news(self) -> bool:
        """Whether the file was changed since everything complete in it was read."""
        return self._file.state() != self._read_to_its_end

    def read(self) -> list[Record]:
        """The next completed records, some :data:`_READ_BYTES` of them; none once everything complete was read.

        :raises ChannelError: a line has no end.
        """
        state = self._file.state()
        if state == self._read_to_its_end:
            return []
        pieces: list[bytes] = []
        length = 0
        while chunk := os.pread(self._file.fileno(), _READ_BYTES, self._offset + length):
            pieces.append(chunk)
            length += len(chunk)
            if b"\n" in chunk:
                return list(self._take(b"".join(pieces).split(b"\n")[:-1]))
            if length > MAX_RECORD_BYTES:
                raise Record(self.path, self._offset, b"").malformed(_TOO_LONG)
        self._read_to_its_end = state
        return []

    def _take(self, lines: list[bytes]) -> Iterator[Record]:
        for line in lines:
            yield Record(self.path, self._offset, line)
            self._offset += len(line) + 1

    def close(self) -> None:
        """Give up the descriptor; reading on, or looking at the owner, opens the file again."""
        self._file.let_go()


def append_whole(file: FileIO, content: bytes, *, size: int, durable: bool) -> int:
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


def open_to_append(path: Path) -> FileIO:
    """:raises OSError: it cannot be opened, or is no file."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    return FileIO(str(path), "a+b", opener=lambda name, _: open_regular(name, flags))


class RecordAppender:
    """Appends records to a file that it keeps locked until it is closed.

    :raises ChannelError: another process, or another appender here, has the file open; its last line has no end.
    :raises OSError: it cannot be opened, or is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        created = not path.exists()
        self._file = open_to_append(path)
        try:
            if not lock_file(self._file, seconds=_LOCK_SECONDS):
                raise ChannelError(
                    "somebody else is writing this file",
                    where=str(path),
                    hint="give every capture process its own name",
                )
            if created:
                sync_directory(path.parent)
            self._size = self._cut_torn_record()
        except BaseException:
            self._file.close()
            raise

    def _cut_torn_record(self) -> int:
        """Cut off what a process that died in mid-append left after the last newline."""
        size = os.fstat(self._file.fileno()).st_size
        end = last_newline(self._file, size)
        if end is None:
            raise Record(self.path, size, b"").malformed(_TOO_LONG)
        if end != size:
            os.ftruncate(self._file.fileno(), end)
        return end

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def last_kind(self) -> str:
        """See ``OwnerView.last_kind``."""
        return OwnerView(self._file).last_kind()

    def append(self, frames: Sequence[bytes], *, durable: bool) -> None:
        """Append records as one piece, all or none, and sync them once where they must outlive the machine.

        :raises ChannelError: no room on the disk; the file is as it was.
        """
        self._size = append_whole(self._file, b"".join(frames), size=self._size, durable=durable)

    def rename(self, path: Path) -> None:
        """Give the file its name, once what it begins with is written."""
        self.path = self.path.rename(path)  # what was planted under the name is replaced, not written

    @property
    def domain(self) -> str:
        """Who sees the lock: see ``lock_domain``."""
        return lock_domain(self._file)

    def beat(self) -> bool:
        """Show others that this process lives. Whether the file's time moved by that: not every file system's does."""
        before = os.fstat(self._file.fileno()).st_mtime_ns
        os.utime(self._file.fileno())
        return os.fstat(self._file.fileno()).st_mtime_ns != before

    def device(self) -> int:
        """The file system that it is on."""
        return os.fstat(self._file.fileno()).st_dev

    def close(self) -> None:
        self._file.close()
