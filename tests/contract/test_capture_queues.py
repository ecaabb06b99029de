# SPDX-License-Identifier: Apache-2.0
"""The contract of the queue of capture work on the built-in queues, and broken ones that its suite must reject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from specforge_core.channel.file_queue import FileQueue
from specforge_core.channel.memory_queue import MemoryQueue
from specforge_core.channel.queue_files import FileMembership
from specforge_core.contracts import CaptureBatch, SampleRef
from specforge_core.contracts.capture_queue import CaptureQueue, Ending, Membership, NumberedLease, Results
from specforge_core.testing.capture_queue_suite import CaptureQueueSuite, DurableQueueSuite
from specforge_core.testing.conformance import assert_rejected


class TestMemoryQueue(CaptureQueueSuite):
    def make_queue(self, directory: Path) -> CaptureQueue:
        return MemoryQueue()


class TestFileQueue(DurableQueueSuite):
    def make_queue(self, directory: Path) -> CaptureQueue:
        return FileQueue(directory, timeout_seconds=5.0)

    def kill_member(self, queue: CaptureQueue, member: Membership) -> None:
        assert isinstance(member, FileMembership)
        member.abandon()


class FinishesWhatWasLost(MemoryQueue):
    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        with self._changed:
            entry = self._book._entries.get(lease.batch.key)
            if entry is not None and entry.lease is not None:
                lease = entry.lease
        return super().finish(lease, refs, signature=signature)


class ForgetsWhatWasRead(MemoryQueue):
    def results(self, after: int, timeout: float) -> Results:
        seen = super().results(after, timeout)
        self.commit(after)
        return seen


class HandsOutTwice(MemoryQueue):
    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        lease = super().take(worker, timeout)
        if lease is not None and lease.number % 5 == 0:
            self.give_back(lease)
        return lease


class NumbersAnew(MemoryQueue):
    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        if self._book.ending is not None:
            self._book.number = 0
        super().offer(batches)


class EndsWhateverIsOpen(MemoryQueue):
    def end(self, ending: Ending) -> bool:
        return super().end(replace(ending, session=self._book.session))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (FinishesWhatWasLost, "test_a_lost_lease_cannot_be_finished"),
        (ForgetsWhatWasRead, "test_results_stay_until_they_are_committed"),
        (HandsOutTwice, "test_no_two_workers_have_one_batch"),
        (NumbersAnew, "test_numbers_begin_above_what_is_asked"),
        (EndsWhateverIsOpen, "test_an_end_is_of_one_session"),
    ],
)
def test_a_broken_queue_is_rejected(broken: type[MemoryQueue], test: str) -> None:
    class Broken(CaptureQueueSuite):
        wait_seconds = 2.0

        def make_queue(self, directory: Path) -> CaptureQueue:
            return broken()

    assert_rejected(Broken, by=test)
