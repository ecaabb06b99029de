# SPDX-License-Identifier: Apache-2.0
"""The records of a file queue's log, and a book that is brought up to date from them.

Others may write into the directory: a record that is not exactly one of these is an error with its place.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, get_args

from specforge_core.channel.queue_book import QueueBook
from specforge_core.channel.queue_files import RefsAt
from specforge_core.contracts import CaptureBatch, read_batch
from specforge_core.contracts.capture_queue import Ending, EndKind, NumberedLease
from specforge_core.features.identity import file_name_problem
from specforge_core.features.record_file import Record, frame

_VERSION = ["specforge queue", 1]
_BATCH_FIELDS = ("split", "epoch", "first", "count", "wanted", "fingerprint")
_ENDING_FIELDS = ("kind", "session", "by", "what", "where", "hint")
_MOST_COUNT = 2**53 - 1
"""The largest integer that every reader of JSON keeps exactly."""


def version_frame() -> bytes:
    """The first record of a new log."""
    return frame("V", [*_VERSION, secrets.token_hex(8)])


def batches_as_json(batches: Sequence[CaptureBatch]) -> list[Any]:
    return [[getattr(batch, name) for name in _BATCH_FIELDS] for batch in batches]


def ending_as_json(ending: Ending) -> list[Any]:
    return [getattr(ending, name) for name in _ENDING_FIELDS]


class Replay:
    """A book as the log tells it.

    :ivar identity: of the log; empty until its first record was read.
    :ivar members: who has joined and neither left nor was dropped, each with the lock domain it found itself in.
    """

    def __init__(self, book: QueueBook[RefsAt]) -> None:
        self.book = book
        self.members: dict[str, str] = {}
        self.identity = ""

    def apply(self, record: Record) -> NumberedLease | None:
        """Take in the next record; the lease that it gave, if it did.

        :raises ChannelError: it is none of this log, naming file and offset.
        """
        body = record.body()
        if not self.identity:
            if record.kind != "V" or type(body) is not list or body[:2] != _VERSION or type(body[-1]) is not str:
                raise record.malformed(f"format {body}, this version reads {_VERSION}")
            self.identity = body[-1]
            return None
        try:
            return self._apply(record.kind, body)
        except ValueError as error:
            raise record.malformed(str(error)) from error

    def _apply(self, kind: str, body: Any) -> NumberedLease | None:
        match kind:
            case "O":
                above, batches = _list(body, 2)
                self.book.offer(_batches(batches), above=_count(above))
            case "T":
                return self.book.take(self._member(body))
            case "F":
                number, worker, offset = _list(body, 3)
                self.book.finish(self._held(number, worker), RefsAt(_name(worker), _count(offset)))
            case "G":
                number, worker, instead = _list(body, 3)
                self.book.give_back(self._held(number, worker), instead=_batches(instead))
            case "J":
                name, domain = _list(body, 2)
                self.book.drop(_name(name))
                self.members[name] = _text(domain)
            case "L" | "D":
                self.members.pop(_name(body), None)
                self.book.drop(body)
            case "C":
                self.book.commit(_count(body))
            case "E":
                self.book.end(_ending(body))
            case _:
                raise ValueError(f"unknown kind {kind!r}")
        return None

    def _member(self, name: Any) -> str:
        if name not in self.members:
            raise ValueError("taken by somebody who has not joined")
        return _name(name)

    def _held(self, number: Any, worker: Any) -> NumberedLease:
        lease = self.book.held(_count(number))
        if lease is None or lease.worker != worker:
            raise ValueError(f"{worker!r} does not hold lease {number}")
        return lease


def _list(value: Any, size: int) -> list[Any]:
    if type(value) is not list or len(value) != size:
        raise ValueError(f"not {size} fields")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_COUNT:
        raise ValueError("a number that is no count")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text that is none")
    return value


def _name(value: Any) -> str:
    if problem := file_name_problem(_text(value)):
        raise ValueError(f"a name that cannot be a file's: {problem}")
    return str(value)


def _batches(value: Any) -> list[CaptureBatch]:
    if type(value) is not list:
        raise ValueError("batches that are no list")
    fields = [_list(batch, len(_BATCH_FIELDS)) for batch in value]
    return [read_batch(dict(zip(_BATCH_FIELDS, batch, strict=True))) for batch in fields]


def _ending(value: Any) -> Ending:
    kind, session, *texts = _list(value, len(_ENDING_FIELDS))
    if kind not in get_args(EndKind):
        raise ValueError("no kind of ending")
    by, what, where, hint = map(_text, texts)
    return Ending(kind=kind, session=_count(session), by=by, what=what, where=where, hint=hint)
