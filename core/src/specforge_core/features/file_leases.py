# SPDX-License-Identifier: Apache-2.0
"""The lease desk of a shared directory: a log of what was asked of a lease book, replayed by everybody.

Each operation takes the log's lock, reads what others appended since, decides, and appends. So its cost is that of the
news. Nothing is synced: an offer lost with the machine is offered again.

Kinds of records: ``V`` format and version (first), ``B`` a batch offered, ``T`` taken (by whom, in which lock domain),
``F`` finished, ``G`` given back, ``D`` a holder dropped, ``E`` ended. ``F`` and ``G`` name a batch that is held then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specforge_core.contracts import CaptureBatch, ChannelError, Lease, LeaseDesk
from specforge_core.features.channel_tails import WRITER_SUFFIX
from specforge_core.features.lease_book import LeaseBook
from specforge_core.features.liveness import OwnerWatch
from specforge_core.features.record_file import OwnerView, Record, frame
from specforge_core.features.shared_log import SharedLog

_LOG_NAME = "leases.log"
_VERSION = ["specforge leases", 1]
_VERSION_FRAME = frame("V", _VERSION)
_LOCK_SECONDS = 30.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05


class FileLeases(LeaseDesk):
    """Thread-safe; several in one process are as good as several processes.

    :param timeout_seconds: a holder whose lock is not seen is gone once its heartbeat stood still for so long.
    """

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._directory = directory
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
            where = str(self._directory / (holder + WRITER_SUFFIX))
            raise ChannelError("only an open writer can hold a lease", where=where)
        others = [other for other in self._book.holders if other != holder]
        self._append([frame("D", other) for other in others if self._is_gone(other, domain=self._domains[other])])
        return self._append([frame("T", [holder, self._log.domain])] if self._book.has_free else [])

    def _settle(self, kind: str, lease: Lease) -> None:
        with self._operation():
            if self._book.holds(lease):
                self._append([frame(kind, lease.batch.key)])

    def _is_gone(self, holder: str, *, domain: str) -> bool:
        """Whether the holder's process, or just its writer, ended."""
        if holder not in self._watches:
            try:
                file = (self._directory / (holder + WRITER_SUFFIX)).open("rb", buffering=0)
            except FileNotFoundError:
                return True
            self._watches[holder] = OwnerWatch(OwnerView(file), timeout_seconds=self._timeout_seconds)
        watch = self._watches[holder]
        # Where its lock was never seen, the file of a writer that closed says so.
        closed = not watch.owner.is_locked() and watch.owner.last_kind() in ("C", "F")
        return closed or watch.is_dead(domain=domain)

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
        except (TypeError, ValueError) as error:
            raise record.malformed(str(error)) from error

    def _apply(self, kind: str, body: Any) -> Lease | None:
        """:raises ValueError: not a record of this log (or TypeError)."""
        match kind:
            case "B":
                self._book.offer(_batch(body))
            case "T":
                holder, self._domains[holder] = body
                return self._book.take(holder)
            case "F":
                self._book.finish(self._held(body))
            case "G":
                self._book.give_back(self._held(body))
            case "D":
                self._book.drop(body)
            case "E":
                self._book.end(body)
            case _:
                raise ValueError(f"unknown kind {kind!r}")
        return None

    def _held(self, key: str) -> Lease:
        lease = self._book.lease(key)
        if lease is None:
            raise ValueError(f"nobody holds {key}")
        return lease


def _batch_record(batch: CaptureBatch) -> list[Any]:
    return [batch.split, batch.epoch, batch.first, batch.count, batch.wanted, batch.fingerprint]


def _batch(record: Any) -> CaptureBatch:
    split, epoch, first, count, wanted, fingerprint = record
    return CaptureBatch(
        split=split, epoch=epoch, first=first, count=count, wanted=tuple(wanted), fingerprint=fingerprint
    )
