# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work in a directory, which may be a shared mount: a log of calls that everybody replays.

Each call takes the log's lock, reads what others appended since, decides, and appends one record, so that its cost is
that of the news. A worker writes the refs of a batch into a file of its own first, and syncs it; the record that
finishes the batch points there. Members keep their files locked and touched: that is how their deaths show.

Kinds of records in ``queue.log``: ``V`` format, version and identity (first), ``J`` a member joined (name, lock
domain), ``L`` left, ``O`` offered (numbers above, batches), ``T`` taken (by whom), ``F`` finished (number, worker,
place of its refs), ``G`` given back (number, worker, what is offered instead), ``D`` dropped, ``C`` committed, ``E``
ended. In ``NAME.refs``: ``R`` the refs of one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from specforge_core.channel.queue_book import Finished, QueueBook
from specforge_core.channel.queue_files import FileMembership, MemberFiles, RefsAt
from specforge_core.channel.queue_records import Replay, batches_as_json, ending_as_json, version_frame
from specforge_core.contracts import CaptureBatch, ChannelError, SampleRef
from specforge_core.contracts.capture_queue import (
    CaptureQueue,
    Ending,
    NumberedLease,
    Result,
    Results,
    check_offer,
    check_refs,
)
from specforge_core.features.record_file import frame
from specforge_core.features.shared_log import SharedLog

T = TypeVar("T")

_LOG_NAME = "queue.log"
_LOCK_SECONDS = 30.0
"""Others hold the lock for one append and its sync; a file server that hangs is not waited for forever."""
_OFFERED_PER_RECORD = 1024
"""Some hundred bytes each, so that a record stays far below what readers take."""
_RESULTS_AT_ONCE = 256
"""Their refs fit a few megabytes, and whoever reads them looks at the stop signal in between."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # a look costs a stat; a batch takes tenths of a second
_LOOK_SECONDS = 0.25
"""How often dead members are looked for: a look costs a lock and a stat for each."""


class FileQueue(CaptureQueue):
    """Thread-safe; several in one process are as good as several processes.

    :param timeout_seconds: a member whose heartbeat stood still for so long is dropped, whoever has its lock.
    """

    def __init__(self, directory: Path, *, timeout_seconds: float) -> None:
        self._log = SharedLog(directory / _LOG_NAME, lock_seconds=_LOCK_SECONDS)
        self._files = MemberFiles(directory, timeout_seconds=timeout_seconds)
        self._replay = Replay(QueueBook[RefsAt]())
        self._fault: ChannelError | None = None
        self._looked = float("-inf")

    @property
    def _book(self) -> QueueBook[RefsAt]:
        return self._replay.book

    def join(self, name: str) -> FileMembership:
        """:raises ChannelError: a name that cannot be a file's, or under which somebody lives."""
        membership = self._files.join(name, leave=self._leave)
        try:
            with self._call():
                self._append("J", [name, self._log.domain])
        except BaseException:
            membership.abandon()
            raise
        return membership

    def _leave(self, name: str) -> None:
        with self._call():
            if name in self._replay.members:
                self._append("L", name)

    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        check_offer(batches, above)
        with self._call():
            for first in range(0, max(len(batches), 1), _OFFERED_PER_RECORD):
                part = batches[first : first + _OFFERED_PER_RECORD]
                self._append("O", [above, batches_as_json(part)])

    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        self._files.require_joined(worker)

        def take() -> NumberedLease | None:
            if worker not in self._replay.members:  # it stood still, was taken for dead, and goes on
                self._append("J", [worker, self._log.domain])
            if not self._book.has_free:
                self._drop_dead()
            return self._append("T", worker) if self._book.has_free else None

        return self._when(take, timeout)

    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        check_refs(lease, refs)
        offset = self._files.write_refs(lease.worker, refs, signature)
        with self._call():
            if not self._book.holds(lease):
                return False
            self._append("F", [lease.number, lease.worker, offset], durable=True)
            return True

    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        check_offer(instead, 0)
        with self._call():
            if self._book.holds(lease):
                self._append("G", [lease.number, lease.worker, batches_as_json(instead)])

    def outstanding(self) -> Sequence[CaptureBatch]:
        with self._call():
            return self._book.outstanding()

    def results(self, after: int, timeout: float) -> Results:
        seen: list[Results] = []

        def look() -> list[Finished[RefsAt]]:
            found = self._book.results(after)[:_RESULTS_AT_ONCE]
            if not found:
                self._drop_dead()
            seen[:] = [self._state()]  # of the same moment: an ending that is seen has no result before it that is not
            return found

        found = self._when(look, timeout)
        return replace(seen[0], results=[self._read(item) for item in found])

    def _state(self) -> Results:
        return Results(
            identity=self._replay.identity,
            results=(),
            members=frozenset(self._replay.members),
            session=self._book.session,
            ending=self._book.ending,
            outstanding=len(self._book.outstanding()),
        )

    def _read(self, item: Finished[RefsAt]) -> Result:
        refs, signature = self._files.read_refs(item.payload)
        lease = item.lease
        return Result(
            position=item.position,
            batch=lease.batch,
            number=lease.number,
            worker=lease.worker,
            refs=refs,
            signature=signature,
        )

    def commit(self, position: int) -> None:
        with self._call():
            if position > self._book.committed:
                self._append("C", position, durable=True)

    def end(self, ending: Ending) -> bool:
        with self._call():
            if self._book.ending is not None or ending.session != self._book.session:
                return False
            self._append("E", ending_as_json(ending), durable=True)
            return True

    def close(self) -> None:
        self._files.close()
        self._log.close()

    def _drop_dead(self) -> None:
        """Bring back what members held that are dead, or stand still; where there is nothing else to be had."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for name, domain in list(self._replay.members.items()):
            if self._files.is_gone(name, domain=domain, holds_any=name in self._book.workers):
                self._append("D", name)

    def _when(self, look: Callable[[], T], timeout: float) -> T:
        """What there is, as soon as there is something; what there is at the end of the session, or of the time."""
        deadline, pause = time.monotonic() + timeout, _SHORTEST_PAUSE
        while True:
            with self._call():
                found = look()
                if found or self._book.ending is not None:
                    return found
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return found
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Alone with the log, and everything in it is in the book.

        Most news are read before the log is locked, so that many workers keep it locked for a moment each.
        """
        with self._log.locked(before=self._catch_up):
            self._catch_up()
            if not self._replay.identity:
                self._log.append([], version=version_frame())
                self._catch_up()
            yield

    def _append(self, kind: str, body: object, *, durable: bool = False) -> NumberedLease | None:
        """Append to the log and replay it: the book changes in no other way. The lease that was taken, if any."""
        self._log.append([frame(kind, body)], version=b"", durable=durable)
        return self._catch_up()

    def _catch_up(self) -> NumberedLease | None:
        if self._fault is not None:
            raise self._fault
        lease = None
        try:
            for record in self._log.read():
                lease = self._replay.apply(record)
        except ChannelError as error:
            self._fault = error  # the book is of no use any more
            raise
        self._files.forget_all_but(self._replay.members)
        return lease
