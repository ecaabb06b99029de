# SPDX-License-Identifier: Apache-2.0
"""The lease desk of a shared directory: a log of what was asked of a lease book, replayed by everybody.

Each operation takes the log's lock, reads what others appended since, decides, and appends. So its cost is that of the
news. Nothing is synced: an offer lost with the machine is offered again.

Kinds of records: ``V`` format and version (first), ``B`` a batch offered, ``T`` taken (by whom, in which lock domain),
``F`` finished, ``G`` given back, ``D`` a holder dropped, ``E`` ended. ``F`` and ``G`` name a batch that is held then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specforge_core.contracts import CaptureBatch, ChannelError, Lease, LeaseDesk, read_batch
from specforge_core.features.channel_tails import WRITER_SUFFIX
from specforge_core.features.followed_file import FollowedFile, OwnerView
from specforge_core.features.identity import file_name_problem
from specforge_core.features.lease_book import LeaseBook
from specforge_core.features.liveness import OwnerWatch
from specforge_core.features.record_file import Record, frame
from specforge_core.features.shared_log import SharedLog

_LOG_NAME = "leases.log"
_VERSION = ["specforge leases", 1]
_VERSION_FRAME = frame("V", _VERSION)
_BATCH_FIELDS = ("split", "epoch", "first", "count", "wanted", "fingerprint")
_LOCK_SECONDS = 30.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05

_log = logging.getLogger(__name__)


class FileLeases(LeaseDesk):
    """Thread-safe; several in one process are as good as several processes.

    :param timeout_seconds: a holder is passed over once its heartbeat stood still for so long, whoever has its lock.
    :param owner_suffix: of the file that each holder keeps open, named for it.
    """

    def __init__(self, directory: Path, *, timeout_seconds: float, owner_suffix: str = WRITER_SUFFIX) -> None:
        self._directory = directory
        self._owner_suffix = owner_suffix
        self._timeout_seconds = timeout_seconds
        self._log = SharedLog(directory / _LOG_NAME, lock_seconds=_LOCK_SECONDS)
        self._book = LeaseBook()
        self._fault: ChannelError | None = None
        self._versioned = False
        self._domains: dict[str, str] = {}
        self._watches: dict[str, OwnerWatch] = {}

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        with self._operation():
            fresh = [batch for batch in batches if not self._book.is_outstanding(batch)]
            self._append([frame("B", _batch_record(batch)) for batch in fresh])

    def take(self, holder: str, timeout: float) -> Lease | None:
        """:raises ChannelError: no living process has a writer of that name open."""
        deadline = time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        while True:
            with self._operation():
                lease = self._take(holder)
                if lease is not None or self._book.ended is not None:
                    return lease
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def finish(self, lease: Lease) -> None:
        self._settle("F", lease)

    def give_back(self, lease: Lease) -> None:
        self._settle("G", lease)

    def outstanding(self) -> list[CaptureBatch]:
        with self._operation():
            return self._book.outstanding()

    def end(self, reason: str) -> None:
        with self._operation():
            self._append([frame("E", reason)])

    @property
    def ended(self) -> str | None:
        with self._operation():
            return self._book.ended

    def close(self) -> None:
        self._log.close()

    def _take(self, holder: str) -> Lease | None:
        if self._is_gone(holder, domain=""):
            where = str(self._directory / (holder + self._owner_suffix))
            raise ChannelError("only an open writer can hold a lease", where=where)
        others = [other for other in self._book.holders if other != holder]
        gone = [other for other in others if self._is_gone(other, domain=self._domains[other]) or self._stalls(other)]
        self._append([frame("D", other) for other in gone])
        return self._append([frame("T", [holder, self._log.domain])] if self._book.has_free else [])

    def _settle(self, kind: str, lease: Lease) -> None:
        with self._operation():
            if self._book.holds(lease):
                self._append([frame(kind, lease.batch.key)])

    def _is_gone(self, holder: str, *, domain: str) -> bool:
        """Whether the holder's process, or just its writer, ended."""
        if holder not in self._watches:
            path = self._directory / (holder + self._owner_suffix)
            if not path.exists():
                return True
            self._watches[holder] = OwnerWatch(OwnerView(FollowedFile(path)), timeout_seconds=self._timeout_seconds)
        watch = self._watches[holder]
        # Where its lock was never seen, the file of a writer that closed says so.
        closed = not watch.owner.is_locked() and watch.owner.last_kind() in ("C", "F")
        return closed or watch.is_dead(domain=domain)

    def _stalls(self, holder: str) -> bool:
        """Whether the holder's process lives and stands still: a stopped one, or one that hangs on its file system.

        Its batches go to others. If it goes on after all, it finds its lease lost; what it then publishes is surplus.
        """
        if not self._watches[holder].is_stalled():
            return False
        _log.warning("capture process %s stands still: what it was to capture goes to another one", holder)
        return True

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Alone with the log, and everything in it is in the book."""
        with self._log.locked():
            self._catch_up()
            yield

    def _append(self, frames: Sequence[bytes]) -> Lease | None:
        """Append to the log and replay it: the book changes in no other way. The lease that was taken, if any."""
        if not frames:
            return None
        self._log.append(frames, version=_VERSION_FRAME)
        return self._catch_up()

    def _catch_up(self) -> Lease | None:
        """Replay what is new; its last lease, where that is what it ends with."""
        if self._fault is not None:
            raise self._fault
        lease = None
        try:
            for record in self._log.read():
                lease = self._replay(record)
        except ChannelError as error:
            self._fault = error  # the book is of no use any more
            raise
        for watched in (self._watches, self._domains):
            for holder in watched.keys() - self._book.holders:
                del watched[holder]
        return lease

    def _replay(self, record: Record) -> Lease | None:
        body = record.body()
        if not self._versioned:
            if (record.kind, body) != ("V", _VERSION):
                raise record.malformed(f"format {body}, this version reads {_VERSION}")
            self._versioned = True
            return None
        try:
            return self._apply(record.kind, body)
        except ValueError as error:
            raise record.malformed(str(error)) from error

    def _apply(self, kind: str, body: Any) -> Lease | None:
        """:raises ValueError: not a record of this log."""
        match kind:
            case "B":
                self._book.offer(_batch(body))
            case "T":
                holder, domain = _texts(body, count=2)
                if problem := file_name_problem(holder):
                    raise ValueError(f"a holder that cannot name a file: {problem}")
                self._domains[holder] = domain
                return self._book.take(holder)
            case "F":
                self._book.finish(self._held(*_texts([body], count=1)))
            case "G":
                self._book.give_back(self._held(*_texts([body], count=1)))
            case "D":
                self._book.drop(*_texts([body], count=1))
            case "E":
                self._book.end(*_texts([body], count=1))
            case _:
                raise ValueError(f"unknown kind {kind!r}")
        return None

    def _held(self, key: str) -> Lease:
        lease = self._book.lease(key)
        if lease is None:
            raise ValueError(f"nobody holds {key}")
        return lease


def _batch_record(batch: CaptureBatch) -> list[Any]:
    return [getattr(batch, name) for name in _BATCH_FIELDS]


def _batch(record: Any) -> CaptureBatch:
    """:raises ValueError: it is not what ``_batch_record`` makes."""
    if type(record) is not list or len(record) != len(_BATCH_FIELDS):
        raise ValueError("not the fields of a batch")
    return read_batch(dict(zip(_BATCH_FIELDS, record, strict=True)))


def _texts(values: Any, *, count: int) -> list[str]:
    """:raises ValueError: not so many texts."""
    if type(values) is not list or [*map(type, values)] != [str] * count:
        raise ValueError("it does not name what it is about")
    return values
