# SPDX-License-Identifier: Apache-2.0
"""What every queue of capture work must do: a batch in one worker's hands, finished once, forgotten when committed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specforge_core.contracts import CaptureBatch, ChannelError, skipped_ref
from specforge_core.contracts.capture_queue import CaptureQueue, Ending, NumberedLease
from specforge_core.testing.queue_under_test import QueueUnderTest, Worker, make_batch, make_refs, read_all
from specforge_core.testing.samples import make_ref


class CaptureQueueSuite(QueueUnderTest):
    """The contract of :class:`specforge_core.contracts.capture_queue.CaptureQueue`."""

    def test_a_new_queue_has_nothing(self, worker: Worker) -> None:
        seen = worker.queue.results(0, 0.0)
        assert (seen.results, seen.session, seen.ending, seen.outstanding) == ([], 0, None, 0)
        assert seen.members == {worker.name}
        assert list(worker.queue.outstanding()) == []
        worker.take_nothing()

    def test_batches_are_taken_identical_in_order_under_growing_numbers(self, worker: Worker) -> None:
        eval_batch = CaptureBatch(split="eval", epoch=0, first=4, count=4)
        batches = [make_batch(3), make_batch(1, wanted=(0, 3)), eval_batch, make_batch(0, epoch=2)]
        worker.queue.offer(batches[:2])
        worker.queue.offer(batches[2:])
        leases = [worker.take() for _ in batches]
        assert [lease.batch for lease in leases] == batches
        assert {(lease.worker, lease.attempt, lease.session) for lease in leases} == {(worker.name, 1, 1)}
        numbers = [lease.number for lease in leases]
        assert numbers == sorted(set(numbers))
        assert numbers[0] > 0
        worker.take_nothing()
        assert list(worker.queue.outstanding()) == batches

    def test_a_queue_is_told_from_others(self, worker: Worker, opened_again: CaptureQueue, directory: Path) -> None:
        another = self.make_queue(directory.with_name("another"))
        identities = [queue.results(0, 0.0).identity for queue in (worker.queue, opened_again, another)]
        another.close()
        assert identities[0] == identities[1] != identities[2]
        assert "" not in identities

    def test_refs_are_of_their_lease(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        lease = worker.take()
        with pytest.raises(ValueError):
            worker.queue.finish(lease, [*make_refs(lease)[:3], make_ref(3, generation=lease.number + 1)])
        assert worker.queue.finish(lease, [*make_refs(lease)[:3], skipped_ref("p.e0", prompt_id="p", epoch=0)])
        assert read_all(worker.queue)[0].refs[3].skipped

    def test_waits_end(self, worker: Worker) -> None:
        waits = (
            lambda seconds: worker.queue.take(worker.name, seconds),
            lambda seconds: worker.queue.results(0, seconds),
        )
        for wait in waits:
            for seconds in (0.0, 0.3):
                begun = time.monotonic()
                wait(seconds)
                assert seconds * 0.9 <= time.monotonic() - begun < seconds + 2.0

    def test_waits_end_with_what_is_waited_for(self, worker: Worker, opened_again: CaptureQueue) -> None:
        with ThreadPoolExecutor(2) as threads:
            taking = threads.submit(worker.take)
            reading = threads.submit(opened_again.results, 0, self.wait_seconds)
            time.sleep(0.1)
            opened_again.offer([make_batch(0)])
            assert worker.finish(taking.result(self.wait_seconds))
            assert len(reading.result(self.wait_seconds).results) == 1

    def test_no_two_workers_have_one_batch(self, worker: Worker, other: Worker) -> None:
        worker.queue.offer([make_batch(number) for number in range(40)])
        taken: list[NumberedLease] = []

        def take(who: Worker) -> None:
            while (lease := who.queue.take(who.name, 0.0)) is not None:
                taken.append(lease)

        threads = [threading.Thread(target=take, args=(who,)) for who in (worker, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.wait_seconds)
        assert sorted(lease.batch.first for lease in taken) == [4 * number for number in range(40)]
        assert len({lease.number for lease in taken}) == 40

    def test_finishing_is_publishing(self, worker: Worker, opened_again: CaptureQueue) -> None:
        worker.queue.offer([make_batch(number) for number in range(3)])
        leases = [worker.take() for _ in range(3)]
        for lease in (leases[1], leases[0]):
            assert worker.finish(lease, signature=f"signed {lease.number}")
        assert worker.queue.finish(leases[2], [])
        assert opened_again.results(0, self.wait_seconds).outstanding == 0
        found = read_all(opened_again)
        assert [result.position for result in found] == [1, 2, 3]
        for result, lease in zip(found, (leases[1], leases[0], leases[2]), strict=True):
            assert (result.batch, result.number, result.worker) == (lease.batch, lease.number, worker.name)
            assert list(result.refs) == ([] if lease is leases[2] else make_refs(lease))
            assert result.signature == ("" if lease is leases[2] else f"signed {lease.number}")

    def test_a_lost_lease_cannot_be_finished(self, worker: Worker, other: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        lost = other.take()
        other.queue.give_back(lost)
        held = worker.take()
        assert held.number > lost.number
        assert not other.finish(lost)
        other.queue.give_back(lost)
        assert read_all(worker.queue) == []
        assert worker.finish(held)
        assert not other.finish(lost)
        assert not worker.finish(held)
        assert [result.number for result in read_all(worker.queue)] == [held.number]

    def test_what_a_member_held_comes_back_when_it_leaves(self, worker: Worker, other: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        lost = other.take()
        other.member.close()
        again = worker.take()
        assert (again.batch, again.attempt) == (lost.batch, 2)
        assert other.name not in worker.queue.results(0, 0.0).members

    def test_what_a_dead_member_held_comes_back(self, worker: Worker, other: Worker) -> None:
        worker.queue.offer([make_batch(0), make_batch(1)])
        lost = [other.take() for _ in range(2)]
        worker.take_nothing()
        self.kill_member(other.queue, other.member)
        again = [worker.take() for _ in range(2)]
        assert [(lease.batch, lease.attempt) for lease in again] == [(lease.batch, 2) for lease in lost]
        assert worker.queue.results(0, 0.0).members == {worker.name}

    def test_what_is_given_back_counts_no_attempt(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0), make_batch(1)])
        worker.queue.give_back(worker.take())
        again = worker.take()
        assert (again.batch, again.attempt) == (make_batch(0), 1)

    def test_parts_take_the_place_of_what_is_given_back(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        parts = [replace(make_batch(0), first=place, count=1) for place in range(4)]
        worker.queue.give_back(worker.take(), instead=parts)
        assert list(worker.queue.outstanding()) == parts
        assert [worker.take().batch for _ in parts] == parts

    def test_an_offer_of_what_is_there_changes_nothing(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0), make_batch(0)])
        lease = worker.take()
        worker.queue.offer([make_batch(0)])
        worker.take_nothing()
        assert worker.finish(lease)
        worker.queue.offer([make_batch(0)])  # its result is not committed
        worker.take_nothing()
        worker.queue.commit(1)
        worker.queue.offer([make_batch(0)])
        assert worker.take().number > lease.number

    def test_what_no_reader_would_take_is_not_offered(self, worker: Worker, opened_again: CaptureQueue) -> None:
        """An entry that others cannot read would end them all."""
        opened_again.offer([make_batch(0)])
        for batches, above in (([], -1), ([], 1 << 70), ([replace(make_batch(1), wanted=(9,))], 0)):
            with pytest.raises((ValueError, ChannelError)):
                worker.queue.offer(batches, above=above)
        assert worker.take().batch == make_batch(0)
        assert list(opened_again.outstanding()) == [make_batch(0)]

    def test_results_stay_until_they_are_committed(self, worker: Worker, opened_again: CaptureQueue) -> None:
        worker.queue.offer([make_batch(number) for number in range(4)])
        for _ in range(4):
            assert worker.finish(worker.take())
        assert [result.position for result in read_all(opened_again, after=2)] == [3, 4]
        opened_again.commit(2)
        opened_again.commit(1)
        assert [result.position for result in read_all(worker.queue)] == [3, 4]
        worker.queue.offer([make_batch(9)])
        assert worker.finish(worker.take())
        assert [result.position for result in read_all(worker.queue)] == [3, 4, 5]

    def test_an_end_withdraws_what_is_outstanding_and_keeps_results(
        self, worker: Worker, opened_again: CaptureQueue
    ) -> None:
        worker.queue.offer([make_batch(number) for number in range(3)])
        done, held = worker.take(), worker.take()
        assert worker.finish(done)
        ending = Ending(kind="failed", session=1, by="train", what="no room", where="disk", hint="free some")
        assert opened_again.end(ending)
        seen = worker.queue.results(1, self.wait_seconds)
        assert (seen.ending, seen.outstanding) == (ending, 0)
        assert worker.queue.take(worker.name, self.wait_seconds) is None
        assert not worker.finish(held)
        assert [result.number for result in read_all(worker.queue)] == [done.number]

    def test_an_end_is_of_one_session(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        lease = worker.take()
        stopped = Ending(kind="stopped", session=1)
        assert worker.queue.end(stopped)
        assert not worker.queue.end(replace(stopped, kind="failed")), "it has ended"
        worker.queue.offer([make_batch(0)])
        seen = worker.queue.results(0, 0.0)
        assert (seen.session, seen.ending) == (2, None)
        assert not worker.queue.end(stopped), "another session is open"
        assert not worker.finish(lease)
        again = worker.take()
        assert (again.session, again.attempt) == (2, 1)
        assert again.number > lease.number

    def test_numbers_begin_above_what_is_asked(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)], above=1000)
        worker.queue.offer([make_batch(1)], above=5)
        first, second = worker.take(), worker.take()
        assert 1000 < first.number < second.number

    def test_only_members_take(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        with pytest.raises(ChannelError):
            worker.queue.take("nobody", 0.0)
        worker.take()

    def test_a_name_is_one_members(self, worker: Worker, opened_again: CaptureQueue) -> None:
        with pytest.raises(ChannelError):
            opened_again.join(worker.name)
        opened_again.join("capture-2").close()
        opened_again.join("capture-2").close()

    def test_nothing_but_metadata_is_published(self, worker: Worker) -> None:
        worker.queue.offer([make_batch(0)])
        lease = worker.take()
        anything: Any = make_ref
        with pytest.raises(TypeError):
            worker.queue.finish(lease, [replace(make_ref(0), num_tokens=anything)])
        assert read_all(worker.queue) == []
        assert worker.finish(lease)

    def test_from_many_threads_each_batch_is_finished_once(
        self, queue: CaptureQueue, opened_again: CaptureQueue
    ) -> None:
        count = 120

        def work(opened: CaptureQueue, name: str) -> bool:
            member, turn = opened.join(name), 0
            while (lease := opened.take(name, 0.2)) is not None:
                turn += 1
                if turn % 7 == 3:
                    opened.give_back(lease)
                else:
                    assert opened.finish(lease, make_refs(lease))
            member.close()
            return True

        queue.offer([make_batch(number) for number in range(count)])
        with ThreadPoolExecutor(6) as threads:
            working = [threads.submit(work, (queue, opened_again)[n % 2], f"w{n}") for n in range(6)]
            assert all(done.result(self.wait_seconds) for done in working)
        found = read_all(queue)
        assert [result.position for result in found] == list(range(1, count + 1))
        assert sorted(result.batch.first for result in found) == [4 * number for number in range(count)]


class DurableQueueSuite(CaptureQueueSuite):
    """And of queues that outlive their processes."""

    cross_process = True

    def test_everything_is_there_when_it_is_opened_again(self, directory: Path) -> None:
        queue = self.make_queue(directory)
        identity = queue.results(0, 0.0).identity
        worker = Worker(queue, queue.join("capture-0"), self.wait_seconds)
        queue.offer([make_batch(number) for number in range(4)], above=40)
        leases = [worker.take() for _ in range(3)]
        for lease in leases[:2]:
            assert worker.finish(lease, signature="s")
        queue.commit(1)
        self.kill_member(queue, worker.member)
        queue.close()
        queue = self.make_queue(directory)
        assert queue.results(0, 0.0).identity == identity
        assert [(r.position, r.number, list(r.refs), r.signature) for r in read_all(queue)] == [
            (2, leases[1].number, make_refs(leases[1]), "s")
        ]
        worker = Worker(queue, queue.join("capture-0"), self.wait_seconds)
        again = [worker.take() for _ in range(2)]
        assert [(lease.batch, lease.attempt) for lease in again] == [(make_batch(2), 2), (make_batch(3), 1)]
        assert again[0].number > leases[2].number
        worker.member.close()
        queue.close()
