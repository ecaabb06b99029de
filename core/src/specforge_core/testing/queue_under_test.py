# SPDX-License-Identifier: Apache-2.0
"""What the suites of a queue of capture work share: a queue opened twice, and a worker at each opening."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from specforge_core.contracts import CaptureBatch, SampleRef
from specforge_core.contracts.capture_queue import CaptureQueue, Membership, NumberedLease, Result
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.samples import make_ref

_WAIT_SECONDS = 30.0
"""Deaths are noticed after the heartbeat's timeout, which parts set to some seconds in tests."""


def make_batch(number: int, *, epoch: int = 0, wanted: tuple[int, ...] = ()) -> CaptureBatch:
    """The batch of four prompts at place ``4 * number``."""
    return CaptureBatch(split="train", epoch=epoch, first=4 * number, count=4, wanted=wanted, fingerprint="f" * 32)


def make_refs(lease: NumberedLease) -> list[SampleRef]:
    """Refs as a worker puts them under a lease."""
    places = range(lease.batch.first, lease.batch.first + lease.batch.count)
    return [make_ref(place, epoch=lease.batch.epoch, generation=lease.number) for place in places]


def read_all(queue: CaptureQueue, after: int = 0) -> Sequence[Result]:
    """Every result that is there now."""
    found: list[Result] = []
    while more := queue.results(found[-1].position if found else after, 0.0).results:
        found += more
    return found


@dataclass(frozen=True)
class Worker:
    """A member of a queue, with the opening at which it joined.

    :param wait_seconds: how long it waits for a lease that must come.
    """

    queue: CaptureQueue
    member: Membership
    wait_seconds: float

    @property
    def name(self) -> str:
        return self.member.name

    def take(self) -> NumberedLease:
        """A lease that is there, or comes as soon as a death is noticed."""
        lease = self.queue.take(self.name, self.wait_seconds)
        assert lease is not None
        return lease

    def take_nothing(self) -> None:
        assert self.queue.take(self.name, 0.0) is None

    def finish(self, lease: NumberedLease, *, signature: str = "") -> bool:
        return self.queue.finish(lease, make_refs(lease), signature=signature)


class QueueUnderTest(ContractSuite):
    """A subclass provides ``make_queue`` and says what else its queue can do."""

    cross_process = False
    """As the descriptor says. Then ``make_queue`` of a directory it knows opens that queue again."""

    wait_seconds = _WAIT_SECONDS
    """How long a test waits for what must come; a negative control waits for what does not."""

    @abstractmethod
    def make_queue(self, directory: Path) -> CaptureQueue:
        """A new queue in an empty directory."""

    def kill_member(self, queue: CaptureQueue, member: Membership) -> None:
        """End a member as the death of its process would: without a word. Its ``close`` then does nothing."""
        pytest.skip("this suite was not told how a member dies")

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "queue"

    @pytest.fixture
    def queue(self, directory: Path) -> Iterator[CaptureQueue]:
        queue = self.make_queue(directory)
        yield queue
        queue.close()

    @pytest.fixture
    def opened_again(self, queue: CaptureQueue, directory: Path) -> Iterator[CaptureQueue]:
        """The queue as another process has it, where it crosses processes."""
        again = self.make_queue(directory) if self.cross_process else queue
        yield again
        again.close()

    @pytest.fixture
    def worker(self, queue: CaptureQueue) -> Iterator[Worker]:
        """``capture-0`` at ``queue``."""
        member = queue.join("capture-0")
        yield Worker(queue, member, self.wait_seconds)
        member.close()

    @pytest.fixture
    def other(self, opened_again: CaptureQueue) -> Iterator[Worker]:
        """``capture-1`` at ``opened_again``, as from another process."""
        member = opened_again.join("capture-1")
        yield Worker(opened_again, member, self.wait_seconds)
        member.close()
