# SPDX-License-Identifier: Apache-2.0
"""What a file channel's files say, read as they grow: one view per writer's file and per reader's file.

Kinds of records: ``V`` format and version (first), ``O`` opened, ``L`` layout, ``R`` a batch of refs, ``A`` acks,
``C`` closed, ``F`` failed with a reason. The last of ``O``, ``C`` and ``F`` is the state of the file's owner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from specforge_core.contracts import SampleRef
from specforge_core.features.liveness import OwnerWatch
from specforge_core.features.record_file import Record, RecordTail, frame
from specforge_core.features.ref_codec import RefDecoder

_VERSION = ["specforge refs", 3]
VERSION_FRAME = frame("V", _VERSION)
WRITER_SUFFIX = ".refs"
READER_SUFFIX = ".acks"
_LOOK_SECONDS = 1.0
"""Between looks at whether an owner ended: each takes a lock, which on a network mount is a question to its server."""
_MAX_REASON = 4000
"""Characters of a reason that are shown: an error and where it was raised; whoever writes the file could write more."""


class _OwnedTail:
    """A record file and the state of the process that owns it.

    :param told: whether a failure that stands in the file already is news.
    """

    def __init__(self, path: Path, *, timeout_seconds: float, told: bool) -> None:
        self.path = path
        self._tail = RecordTail(path)
        self.process = self._tail.owner
        self._watch = OwnerWatch(self.process, timeout_seconds=timeout_seconds)
        self._past = 0 if told else self.process.size()
        self._versioned = False
        self._domain = ""
        self.state: Literal["opened", "closed", "failed"] = "opened"
        self.failure: str | None = None
        self._rests = False
        self._look_again = 0.0
        self.is_dead()  # its lock must have been seen once

    @property
    def owner(self) -> str:
        return self.path.stem

    @property
    def begun(self) -> bool:
        """Whether anything complete is in the file: its owner says who it is with the first records."""
        return self._versioned

    def is_dead(self) -> bool:
        """Whether its owner's process ended, as far as can be seen now."""
        if self._rests and not self._tail.has_news:
            return True
        dead = self._watch.is_dead(domain=self._domain)
        self._let_go()
        return dead

    def lives(self) -> bool:
        """Whether its owner may still add to it."""
        return self.state == "opened" and not self.is_dead()

    def ends_closed(self) -> bool:
        """Whether the last record says that the owner closed it; tells before everything is read."""
        closed = self.process.last_kind() == "C"
        self._let_go()
        return closed

    def close(self) -> None:
        self._tail.close()

    def _read(self) -> Iterator[list[Record]]:
        """What is new, piece by piece: records of the kinds that only one side writes; the state is taken in here."""
        while self._tail.has_news and (records := self._tail.read()):
            self._let_go()
            yield [record for record in records if not self._is_state(record)]
        self._rest_if_ended()

    def _rest_if_ended(self) -> None:
        """Everything was read: an owner that ended is not looked at again before its file changes."""
        if not self._rests or self._tail.has_news:
            now = time.monotonic()
            if self.state == "closed" or now >= self._look_again:
                self._look_again = now + _LOOK_SECONDS
                self._rests = not self.lives()
        self._let_go()

    def _let_go(self) -> None:
        """A run of days has thousands of owners that ended, more than a process may have files open. So a file that
        nobody keeps locked is open only while it is looked at."""
        if not self._watch.was_locked:
            self._tail.close()

    def _is_state(self, record: Record) -> bool:
        if not self._versioned:
            self._check_version(record)
            self._versioned = True
            return True
        if record.kind not in ("O", "C", "F"):
            return False
        body = record.body()
        self.state = {"O": "opened", "C": "closed", "F": "failed"}[record.kind]  # type: ignore[assignment]
        self.failure = str(body)[:_MAX_REASON] if record.kind == "F" and record.offset >= self._past else None
        if record.kind == "O" and type(body) is list and len(body) == 3:
            self._domain = str(body[2])
        return True

    def _check_version(self, record: Record) -> None:
        body = record.body()
        if record.line + b"\n" != VERSION_FRAME:
            raise record.malformed(f"format {body}, this version reads {_VERSION}")


class WriterTail(_OwnedTail):
    """One writer's file: layouts are taken in at once, batches of refs are handed out undecoded."""

    def __init__(self, path: Path, *, timeout_seconds: float, told: bool = True) -> None:
        super().__init__(path, timeout_seconds=timeout_seconds, told=told)
        self._decoder = RefDecoder()

    @property
    def layouts(self) -> list[Any]:
        return self._decoder.layouts

    def read(self) -> list[Record]:
        """The next batches of refs, in the order they were published; none once all there are were read."""
        for records in self._read():
            refs = [record for record in records if self._is_ref(record)]
            if refs:
                return refs
        return []

    def _is_ref(self, record: Record) -> bool:
        if record.kind == "R":
            return True
        if record.kind != "L":
            raise record.malformed(f"unknown kind {record.kind!r}")
        body = record.body()
        try:
            self._decoder.add_layout(body)
        except ValueError as error:
            raise record.malformed(str(error)) from error
        return False

    def decode(self, record: Record) -> list[SampleRef]:
        body = record.body()
        try:
            return self._decoder.decode_batch(body, origin=f"{self.path}, offset {record.offset}")
        except ValueError as error:
            raise record.malformed(str(error)) from error


class ReaderTail(_OwnedTail):
    """One reader's file: the samples it acked."""

    def __init__(self, path: Path, *, timeout_seconds: float, told: bool = True) -> None:
        super().__init__(path, timeout_seconds=timeout_seconds, told=told)

    def read(self) -> Iterator[tuple[str, int]]:
        """Newly acked (sample id, generation)."""
        for records in self._read():
            for record in records:
                body = record.body()
                if record.kind != "A" or not _is_ack(body):
                    raise record.malformed("not an ack")
                yield from ((sample_id, generation) for sample_id, generation in body[1])

    def read_state(self) -> None:
        """Take in what the owner says of itself; its acks are left to another view of the file."""
        for _ in self._read():
            pass


def _is_ack(body: Any) -> bool:
    """A step, and sample ids with generations."""
    return (
        type(body) is list
        and [*map(type, body)] == [int, list]
        and all(type(ack) is list and [*map(type, ack)] == [str, int] for ack in body[1])
    )
