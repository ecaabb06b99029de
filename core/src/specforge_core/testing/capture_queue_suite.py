# SPDX-License-Identifier: Apache-2.0
"""What every queue of capture work must do: a batch in one worker's hands, finished once, forgotten when committed."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specforge_core.contracts import CaptureBatch, ChannelError, SampleRef
from specforge_core.contracts.capture_queue import CaptureQueue, Ending, Membership, NumberedLease, Result
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.samples import make_ref

_WAIT_SECONDS = 30.0


def make_batch(number: int, *, epoch: int = 0, wanted: tuple[int, ...] = ()) -> CaptureBatch:
    """The batch of four prompts at place ``4 * number``."""
    return CaptureBatch(split="train", epoch=epoch, first=4 * number, count=4, wanted=wanted, fingerprint="f" * 32)


def make_refs(lease: NumberedLease) -> list[SampleRef]:
    """Refs as a worker puts them under a lease."""
    places = range(lease.batch.first, lease.batch.first + lease.batch.count)
    return [make_ref(place, epoch=lease.batch.epoch, generation=lease.number) for place in places]


class CaptureQueueSuite(ContractSuite):
    """The contract of :class:`specforge_core.contracts.capture_queue.CaptureQueue`."""

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

    def take_now(self, queue: CaptureQueue, worker: str) -> NumberedLease:
        """A lease that is there, or comes as soon as a death is noticed."""
        lease = queue.take(worker, self.wait_seconds)
        assert lease is not None
        return lease

    def results(self, queue: CaptureQueue, after: int = 0) -> Sequence[Result]:
        found: list[Result] = []
        while more := queue.results(found[-1].position if found else after, 0.0).results:
            found += more
        return found

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
    def worker(self, queue: CaptureQueue) -> Iterator[str]:
        member = queue.join("capture-0")
        yield member.name
        member.close()

    @pytest.fixture
    def other(self, opened_again: CaptureQueue) -> Iterator[Membership]:
        """Another member, ``capture-1``, as from another process."""
        member = opened_again.join("capture-1")
        yield member
        member.close()

    def test_a_new_queue_has_nothing(self, queue: CaptureQueue, worker: str) -> None:
        seen = queue.results(0, 0.0)
        assert (seen.results, seen.session, seen.ending, seen.outstanding) == ([], 0, None, 0)
        assert seen.members == {worker}
        assert list(queue.outstanding()) == []
        assert queue.take(worker, 0.0) is None

    def test_batches_are_taken_identical_in_order_under_growing_numbers(self, queue: CaptureQueue, worker: str) -> None:
        eval_batch = CaptureBatch(split="eval", epoch=0, first=4, count=4)
        batches = [make_batch(3), make_batch(1, wanted=(0, 3)), eval_batch, make_batch(0, epoch=2)]
        queue.offer(batches[:2])
        queue.offer(batches[2:])
        leases = [self.take_now(queue, worker) for _ in batches]
        assert [lease.batch for lease in leases] == batches
        assert {(lease.worker, lease.attempt, lease.session) for lease in leases} == {(worker, 1, 1)}
        numbers = [lease.number for lease in leases]
        assert numbers == sorted(set(numbers))
        assert numbers[0] > 0
        assert queue.take(worker, 0.0) is None
        assert list(queue.outstanding()) == batches

    def test_waits_end(self, queue: CaptureQueue, worker: str) -> None:
        for wait in (lambda seconds: queue.take(worker, seconds), lambda seconds: queue.results(0, seconds)):
            for seconds in (0.0, 0.3):
                begun = time.monotonic()
                wait(seconds)
                assert seconds * 0.9 <= time.monotonic() - begun < seconds + 2.0

    def test_waits_end_with_what_is_waited_for(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue
    ) -> None:
        with ThreadPoolExecutor(2) as threads:
            lease = threads.submit(queue.take, worker, self.wait_seconds)
            results = threads.submit(opened_again.results, 0, self.wait_seconds)
            time.sleep(0.1)
            opened_again.offer([make_batch(0)])
            taken = lease.result(self.wait_seconds)
            assert taken is not None
            assert queue.finish(taken, make_refs(taken))
            assert len(results.result(self.wait_seconds).results) == 1

    def test_no_two_workers_have_one_batch(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue, other: Membership
    ) -> None:
        queue.offer([make_batch(number) for number in range(40)])
        taken: list[NumberedLease] = []

        def take(opened: CaptureQueue, name: str) -> None:
            while (lease := opened.take(name, 0.0)) is not None:
                taken.append(lease)

        threads = [threading.Thread(target=take, args=args) for args in ((queue, worker), (opened_again, other.name))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.wait_seconds)
        assert sorted(lease.batch.first for lease in taken) == [4 * number for number in range(40)]
        assert len({lease.number for lease in taken}) == 40

    def test_finishing_is_publishing(self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue) -> None:
        queue.offer([make_batch(number) for number in range(3)])
        leases = [self.take_now(queue, worker) for _ in range(3)]
        for lease in (leases[1], leases[0]):
            assert queue.finish(lease, make_refs(lease), signature=f"signed {lease.number}")
        assert queue.finish(leases[2], [])
        seen = opened_again.results(0, self.wait_seconds)
        assert [result.position for result in self.results(opened_again)] == [1, 2, 3]
        assert seen.outstanding == 0
        for result, lease in zip(self.results(opened_again), (leases[1], leases[0], leases[2]), strict=True):
            assert (result.batch, result.number, result.worker) == (lease.batch, lease.number, worker)
            assert list(result.refs) == ([] if lease is leases[2] else make_refs(lease))
            assert result.signature == ("" if lease is leases[2] else f"signed {lease.number}")

    def test_a_lost_lease_cannot_be_finished(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue, other: Membership
    ) -> None:
        queue.offer([make_batch(0)])
        lost = self.take_now(opened_again, other.name)
        opened_again.give_back(lost)
        held = self.take_now(queue, worker)
        assert held.number > lost.number
        assert not opened_again.finish(lost, make_refs(lost))
        opened_again.give_back(lost)
        assert self.results(queue) == []
        assert queue.finish(held, make_refs(held))
        assert not opened_again.finish(lost, make_refs(lost))
        assert not queue.finish(held, make_refs(held))
        assert [result.number for result in self.results(queue)] == [held.number]

    def test_what_a_member_held_comes_back_when_it_leaves(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue, other: Membership
    ) -> None:
        queue.offer([make_batch(0)])
        lost = self.take_now(opened_again, other.name)
        other.close()
        again = self.take_now(queue, worker)
        assert (again.batch, again.attempt) == (lost.batch, 2)
        assert other.name not in queue.results(0, 0.0).members

    def test_what_a_dead_member_held_comes_back(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue, other: Membership
    ) -> None:
        queue.offer([make_batch(0), make_batch(1)])
        lost = [self.take_now(opened_again, other.name) for _ in range(2)]
        assert queue.take(worker, 0.0) is None
        self.kill_member(opened_again, other)
        again = [self.take_now(queue, worker) for _ in range(2)]
        assert [(lease.batch, lease.attempt) for lease in again] == [(lease.batch, 2) for lease in lost]
        assert queue.results(0, 0.0).members == {worker}

    def test_what_is_given_back_counts_no_attempt(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0), make_batch(1)])
        queue.give_back(self.take_now(queue, worker))
        again = self.take_now(queue, worker)
        assert (again.batch, again.attempt) == (make_batch(0), 1)

    def test_parts_take_the_place_of_what_is_given_back(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0)])
        parts = [replace(make_batch(0), first=place, count=1) for place in range(4)]
        queue.give_back(self.take_now(queue, worker), instead=parts)
        assert list(queue.outstanding()) == parts
        assert [self.take_now(queue, worker).batch for _ in parts] == parts

    def test_an_offer_of_what_is_there_changes_nothing(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0), make_batch(0)])
        lease = self.take_now(queue, worker)
        queue.offer([make_batch(0)])
        assert queue.take(worker, 0.0) is None
        assert queue.finish(lease, make_refs(lease))
        queue.offer([make_batch(0)])  # its result is not committed
        assert queue.take(worker, 0.0) is None
        queue.commit(1)
        queue.offer([make_batch(0)])
        assert self.take_now(queue, worker).number > lease.number

    def test_results_stay_until_they_are_committed(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue
    ) -> None:
        queue.offer([make_batch(number) for number in range(4)])
        for _ in range(4):
            lease = self.take_now(queue, worker)
            assert queue.finish(lease, make_refs(lease))
        assert [result.position for result in self.results(opened_again, after=2)] == [3, 4]
        opened_again.commit(2)
        opened_again.commit(1)
        assert [result.position for result in self.results(queue)] == [3, 4]
        queue.offer([make_batch(9)])
        lease = self.take_now(queue, worker)
        assert queue.finish(lease, make_refs(lease))
        assert [result.position for result in self.results(queue)] == [3, 4, 5]

    def test_an_end_withdraws_what_is_outstanding_and_keeps_results(
        self, queue: CaptureQueue, worker: str, opened_again: CaptureQueue
    ) -> None:
        queue.offer([make_batch(number) for number in range(3)])
        done, held = self.take_now(queue, worker), self.take_now(queue, worker)
        assert queue.finish(done, make_refs(done))
        ending = Ending(kind="failed", session=1, by="train", what="no room", where="disk", hint="free some")
        assert opened_again.end(ending)
        seen = queue.results(1, self.wait_seconds)
        assert (seen.ending, seen.outstanding) == (ending, 0)
        assert queue.take(worker, self.wait_seconds) is None
        assert not queue.finish(held, make_refs(held))
        assert [result.number for result in self.results(queue)] == [done.number]

    def test_an_end_is_of_one_session(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0)])
        lease = self.take_now(queue, worker)
        stopped = Ending(kind="stopped", session=1)
        assert queue.end(stopped)
        assert not queue.end(replace(stopped, kind="failed")), "it has ended"
        queue.offer([make_batch(0)])
        seen = queue.results(0, 0.0)
        assert (seen.session, seen.ending) == (2, None)
        assert not queue.end(stopped), "another session is open"
        assert not queue.finish(lease, make_refs(lease))
        again = self.take_now(queue, worker)
        assert (again.session, again.attempt) == (2, 1)
        assert again.number > lease.number

    def test_numbers_begin_above_what_is_asked(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0)], above=1000)
        queue.offer([make_batch(1)], above=5)
        numbers = [self.take_now(queue, worker).number for _ in range(2)]
        assert 1000 < numbers[0] < numbers[1]

    def test_only_members_take(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0)])
        with pytest.raises(ChannelError):
            queue.take("nobody", 0.0)
        assert queue.take(worker, 0.0) is not None

    def test_a_name_is_one_members(self, opened_again: CaptureQueue, worker: str) -> None:
        with pytest.raises(ChannelError):
            opened_again.join(worker)
        opened_again.join("capture-2").close()
        opened_again.join("capture-2").close()

    def test_nothing_but_metadata_is_published(self, queue: CaptureQueue, worker: str) -> None:
        queue.offer([make_batch(0)])
        lease = self.take_now(queue, worker)
        anything: Any = make_ref
        holding = replace(make_ref(0), num_tokens=anything)
        with pytest.raises(TypeError):
            queue.finish(lease, [holding])
        assert self.results(queue) == []
        assert queue.finish(lease, make_refs(lease))

    def test_from_many_threads_each_batch_is_finished_once(
        self, queue: CaptureQueue, opened_again: CaptureQueue
    ) -> None:
        count, errors = 120, list[BaseException]()

        def work(opened: CaptureQueue, name: str) -> None:
            member = opened.join(name)
            try:
                for turn in range(10_000):
                    lease = opened.take(name, 0.2)
                    if lease is None:
                        return
                    if turn % 7 == 3:
                        opened.give_back(lease)
                    else:
                        assert opened.finish(lease, make_refs(lease))
            except BaseException as error:  # noqa: BLE001 - raised by the test's own thread
                errors.append(error)
            finally:
                member.close()

        queue.offer([make_batch(number) for number in range(count)])
        openings: Sequence[Callable[[], CaptureQueue]] = [lambda: queue, lambda: opened_again]
        threads = [threading.Thread(target=work, args=(openings[n % 2](), f"w{n}")) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.wait_seconds)
        assert errors == []
        found = self.results(queue)
        assert [result.position for result in found] == list(range(1, count + 1))
        assert sorted(result.batch.first for result in found) == [4 * number for number in range(count)]


class DurableQueueSuite(CaptureQueueSuite):
    """And of queues that outlive their processes."""

    cross_process = True

    def test_everything_is_there_when_it_is_opened_again(self, directory: Path) -> None:
        queue = self.make_queue(directory)
        member = queue.join("capture-0")
        queue.offer([make_batch(number) for number in range(4)], above=40)
        leases = [self.take_now(queue, member.name) for _ in range(3)]
        for lease in leases[:2]:
            assert queue.finish(lease, make_refs(lease), signature="s")
        queue.commit(1)
        self.kill_member(queue, member)
        queue.close()
        queue = self.make_queue(directory)
        assert [(r.position, r.number, list(r.refs), r.signature) for r in self.results(queue)] == [
            (2, leases[1].number, make_refs(leases[1]), "s")
        ]
        member = queue.join("capture-0")
        again = [self.take_now(queue, member.name) for _ in range(2)]
        assert [(lease.batch, lease.attempt) for lease in again] == [(make_batch(2), 2), (make_batch(3), 1)]
        assert again[0].number > leases[2].number
        member.close()
        queue.close()
