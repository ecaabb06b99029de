# SPDX-License-Identifier: Apache-2.0
"""The files of a file queue's members: refs of what each finished, and by lock and heartbeat whether it lives."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from specforge_core.contracts import ChannelError, SampleRef
from specforge_core.contracts.capture_queue import Membership
from specforge_core.contracts.files import make_directory
from specforge_core.features.file_lock import opened_by
from specforge_core.features.followed_file import MAX_RECORD_BYTES, FollowedFile, OwnerView
from specforge_core.features.identity import file_name_problem
from specforge_core.features.liveness import Heartbeat, OwnerWatch
from specforge_core.features.record_file import Record, RecordAppender, frame
from specforge_core.features.ref_codec import RefDecoder, RefEncoder

MEMBER_SUFFIX = ".refs"
_VERSION_FRAME = frame("V", ["specforge results", 1])
_READ_BYTES = 1 << 16
"""One read for most batches: some fifty bytes for each ref."""

_log = logging.getLogger(__name__)


class RefsAt(NamedTuple):
    """Where a worker wrote the refs of one batch."""

    worker: str
    offset: int


class FileMembership(Membership):
    """A member's own file, locked and touched while it is open."""

    def __init__(self, path: Path, *, timeout_seconds: float, leave: Callable[[str], None]) -> None:
        self._path = path
        self._file = RecordAppender(path)
        self._leave = leave
        self._open = True
        try:
            version = [_VERSION_FRAME] if self._file.size == 0 else []
            self._file.append([*version, frame("O", opened_by(self._file.domain))], durable=True)
        except BaseException:
            self._file.close()
            raise
        self._heartbeat = Heartbeat(self._file, timeout_seconds=timeout_seconds)

    @property
    def name(self) -> str:
        return self._path.name.removesuffix(MEMBER_SUFFIX)

    def append(self, body: object) -> int:
        """Append a batch's refs, durably; where they begin."""
        offset = self._file.size
        self._file.append([frame("R", body)], durable=True)
        return offset

    def close(self) -> None:
        if self._open:
            self._open = False
            self._leave(self.name)
            self.abandon()

    def abandon(self) -> None:
        """Let go of the file without a word, as a death would."""
        self._open = False
        self._heartbeat.stop()
        self._file.close()


class MemberFiles:
    """The members' files of one directory, those of this process open."""

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._own: dict[str, FileMembership] = {}
        self._watches: dict[str, OwnerWatch] = {}
        self._read: dict[str, FollowedFile] = {}

    def join(self, name: str, *, leave: Callable[[str], None]) -> FileMembership:
        """:raises ChannelError: a name that cannot be a file's, or under which somebody lives."""
        if problem := file_name_problem(name):
            raise ChannelError(f"{name[:80]!r} cannot name a file: {problem}", where=str(self._directory))

        def let_go(left: str) -> None:
            self._own.pop(left, None)
            leave(left)

        path = self._path(name)
        try:
            make_directory(path.parent)
            membership = FileMembership(path, timeout_seconds=self._timeout_seconds, leave=let_go)
        except OSError as error:
            raise ChannelError(
                f"cannot be written: {error.strerror}", where=str(path), hint="check channel.path and its permissions"
            ) from error
        self._own[name] = membership
        return membership

    def require_joined(self, name: str) -> FileMembership:
        """:raises ChannelError: nobody of that name has joined here."""
        if name not in self._own:
            raise ChannelError(f"{name} has not joined here", where=str(self._directory))
        return self._own[name]

    def write_refs(self, worker: str, refs: Sequence[SampleRef], signature: str) -> int:
        """Write a batch's refs, durably; where they begin.

        :raises ChannelError: there is no room, or a ref cannot be recorded.
        """
        membership = self.require_joined(worker)
        try:
            layouts, record = RefEncoder().encode_batch(refs) if refs else ([], [])
        except ValueError as error:
            raise ChannelError(str(error), where=str(self._path(worker))) from error
        return membership.append([layouts, record, signature])

    def read_refs(self, at: RefsAt) -> tuple[list[SampleRef], str]:
        """What ``write_refs`` wrote there, and its signature.

        :raises ChannelError: it is not there, or was altered.
        """
        record = self._record(at)
        body = record.body()
        if record.kind != "R" or type(body) is not list or len(body) != 3 or type(body[2]) is not str:
            raise record.malformed("not the refs of a batch")
        return _decode(body[0], body[1], record), body[2]

    def is_gone(self, name: str, *, domain: str, holds_any: bool) -> bool:
        """Whether a member is dead; where it holds a batch, also whether it stands still.

        If one that stood still goes on after all, it finds its lease lost.
        """
        if name not in self._watches:
            path = self._path(name)
            if not path.exists():
                return True
            self._watches[name] = OwnerWatch(OwnerView(FollowedFile(path)), timeout_seconds=self._timeout_seconds)
        watch = self._watches[name]
        if watch.is_dead(domain=domain):
            return True
        if holds_any and watch.is_stalled():
            _log.warning("capture process %s stands still: what it was to capture goes to another one", name)
            return True
        return False

    def forget_all_but(self, members: Collection[str]) -> None:
        for name in self._watches.keys() - set(members):
            del self._watches[name]

    def close(self) -> None:
        """The members of this process leave."""
        for membership in list(self._own.values()):
            membership.close()
        for file in self._read.values():
            file.let_go()

    def _path(self, name: str) -> Path:
        return self._directory / (name + MEMBER_SUFFIX)

    def _record(self, at: RefsAt) -> Record:
        if at.worker not in self._read:
            self._read[at.worker] = FollowedFile(self._path(at.worker))
        file, pieces, length = self._read[at.worker].fileno(), list[bytes](), 0
        while chunk := os.pread(file, _READ_BYTES, at.offset + length):
            line, newline, _ = chunk.partition(b"\n")
            pieces.append(line)
            length += len(chunk)
            if newline or length > MAX_RECORD_BYTES:
                break
        return Record(self._path(at.worker), at.offset, b"".join(pieces))


def _decode(layouts: Any, refs: Any, record: Record) -> list[SampleRef]:
    if refs == []:
        return []
    decoder = RefDecoder()
    try:
        for layout in layouts if type(layouts) is list else [None]:
            decoder.add_layout(layout)
        return decoder.decode_batch(refs, origin=f"{record.path}, offset {record.offset}")
    except ValueError as error:
        raise record.malformed(str(error)) from error
