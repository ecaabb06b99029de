# SPDX-License-Identifier: Apache-2.0
"""What every channel's lease desk must do: one holder at a time, nothing forgotten, order, attempts, an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from specforge_core.contracts import CaptureBatch, Lease, LeaseDesk, RefChannel, RefWriter
from specforge_core.testing.channel_under_test import ChannelUnderTest


def make_batch(number: int, *, epoch: int = 0, wanted: tuple[int, ...] = ()) -> CaptureBatch:
    """The batch of four prompts at place ``4 * number``."""
    return CaptureBatch(split="train", epoch=epoch, first=4 * number, count=4, wanted=wanted, fingerprint="f" * 32)


class LeaseDeskSuite(ChannelUnderTest):
    """The contract of :class:`specforge_core.contracts.LeaseDesk`. The holder ``capture-0`` is the fixture's writer."""

    def take_now(self, desk: LeaseDesk, holder: str) -> Lease:
        """A lease that is there, or comes as soon as a death is noticed."""
        lease = desk.take(holder, self.wait_seconds)
        assert lease is not None
        return lease

    @pytest.fixture
    def desk(self, channel: RefChannel, writer: RefWriter) -> Iterator[LeaseDesk]:
        desk = channel.leases()
        yield desk
        desk.close()

    @pytest.fixture
    def other(self, opened_again: RefChannel) -> Iterator[RefWriter]:
        """Another holder, ``capture-1``, as from another process."""
        other = opened_again.writer("capture-1")
        yield other
        other.close()

    @pytest.fixture
    def others_desk(self, opened_again: RefChannel, other: RefWriter) -> Iterator[LeaseDesk]:
        desk = opened_again.leases()
        yield desk
        desk.close()

    def test_batches_are_taken_identical_and_in_order(self, desk: LeaseDesk) -> None:
        batches = [
            make_batch(3),
            make_batch(1, wanted=(0, 3)),
            CaptureBatch(split="eval", epoch=0, first=4, count=4),
            make_batch(0, epoch=2),
        ]
        desk.offer(batches[:2])
        desk.offer(batches[2:])
        assert [desk.take("capture-0", 1.0) for _ in batches] == [
            Lease(batch=batch, holder="capture-0", attempt=1) for batch in batches
        ]
        assert desk.take("capture-0", 0.0) is None

    def test_a_new_desk_has_nothing(self, desk: LeaseDesk) -> None:
        assert desk.outstanding() == []
        assert desk.ended is None
        assert desk.take("capture-0", 0.0) is None

    def test_a_take_waits_no_longer_than_told(self, desk: LeaseDesk) -> None:
        for timeout in (0.0, 0.3):
            begun = time.monotonic()
            assert desk.take("capture-0", timeout) is None
            assert timeout * 0.9 <= time.monotonic() - begun < timeout + 2.0

    def test_a_take_returns_as_soon_as_something_is_offered(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        timer = threading.Timer(0.1, others_desk.offer, [[make_batch(0)]])
        timer.start()
        begun = time.monotonic()
        lease = desk.take("capture-0", self.wait_seconds)
        waited = time.monotonic() - begun
        timer.join(self.wait_seconds)
        assert lease == Lease(batch=make_batch(0), holder="capture-0", attempt=1)
        assert waited < self.wait_seconds / 2

    def test_outstanding_is_offered_and_not_finished(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        batches = [make_batch(number) for number in range(3)]
        desk.offer(batches)
        lease = self.take_now(others_desk, "capture-1")
        for view in (desk, others_desk):
            assert sorted(view.outstanding(), key=lambda batch: batch.first) == batches
        others_desk.finish(lease)
        others_desk.finish(lease)
        for view in (desk, others_desk):
            assert sorted(view.outstanding(), key=lambda batch: batch.first) == batches[1:]

    def test_an_outstanding_batch_stays_as_it_is(self, desk: LeaseDesk) -> None:
        desk.offer([make_batch(0), make_batch(1), make_batch(0)])
        lease = self.take_now(desk, "capture-0")
        desk.offer([make_batch(0, wanted=(1,)), make_batch(1, wanted=(1,))])
        assert self.take_now(desk, "capture-0").batch == make_batch(1)
        assert desk.take("capture-0", 0.05) is None
        desk.finish(lease)
        assert desk.outstanding() == [make_batch(1)]

    def test_a_finished_batch_may_be_offered_again(self, desk: LeaseDesk) -> None:
        desk.offer([make_batch(0)])
        desk.finish(self.take_now(desk, "capture-0"))
        assert desk.take("capture-0", 0.05) is None
        desk.offer([make_batch(0, wanted=(2,))])
        assert self.take_now(desk, "capture-0") == Lease(
            batch=make_batch(0, wanted=(2,)), holder="capture-0", attempt=1
        )

    def test_a_living_holder_keeps_its_lease(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        desk.offer([make_batch(0)])
        lease = self.take_now(desk, "capture-0")
        assert others_desk.take("capture-1", 0.5) is None
        desk.finish(lease)
        assert others_desk.outstanding() == []

    def test_what_is_given_back_is_taken_first(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        desk.offer([make_batch(number) for number in range(4)])
        leases = [self.take_now(desk, "capture-0") for _ in range(2)]
        desk.give_back(leases[1])
        desk.give_back(leases[0])
        taken = [self.take_now(others_desk, "capture-1") for _ in range(3)]
        assert [lease.batch for lease in taken] == [make_batch(1), make_batch(0), make_batch(2)]
        assert [lease.attempt for lease in taken] == [1, 1, 1]

    def test_a_holder_that_closed_its_writer_is_gone(
        self, desk: LeaseDesk, others_desk: LeaseDesk, other: RefWriter
    ) -> None:
        desk.offer([make_batch(0), make_batch(1)])
        lost = self.take_now(others_desk, "capture-1")
        other.close()
        assert self.take_now(desk, "capture-0") == Lease(batch=lost.batch, holder="capture-0", attempt=2)
        assert self.take_now(desk, "capture-0") == Lease(batch=make_batch(1), holder="capture-0", attempt=1)

    def test_a_holder_that_failed_is_gone(self, desk: LeaseDesk, others_desk: LeaseDesk, other: RefWriter) -> None:
        desk.offer([make_batch(0)])
        lost = self.take_now(others_desk, "capture-1")
        other.fail("out of memory")
        assert self.take_now(desk, "capture-0") == Lease(batch=lost.batch, holder="capture-0", attempt=2)

    def test_what_a_dead_holder_held_comes_back(
        self, desk: LeaseDesk, others_desk: LeaseDesk, *, opened_again: RefChannel, other: RefWriter
    ) -> None:
        desk.offer([make_batch(number) for number in range(3)])
        lost = [self.take_now(others_desk, "capture-1") for _ in range(2)]
        self.kill_writer(opened_again, other)
        deadline = time.monotonic() + self.wait_seconds
        taken: list[Lease] = []
        while len(taken) < 3 and time.monotonic() < deadline:
            lease = desk.take("capture-0", 0.1)
            taken += [lease] if lease is not None else []
        assert {lease.batch.key: lease.attempt for lease in taken} == {
            lost[0].batch.key: 2,
            lost[1].batch.key: 2,
            make_batch(2).key: 1,
        }

    def test_a_lost_lease_cannot_be_finished(self, desk: LeaseDesk, others_desk: LeaseDesk, other: RefWriter) -> None:
        desk.offer([make_batch(0)])
        lost = self.take_now(others_desk, "capture-1")
        other.close()
        lease = self.take_now(desk, "capture-0")
        others_desk.finish(lost)
        others_desk.give_back(lost)
        assert desk.outstanding() == [make_batch(0)]
        assert desk.take("capture-0", 0.05) is None
        desk.give_back(lease)
        again = self.take_now(desk, "capture-0")
        assert again.attempt == lease.attempt == 2
        desk.finish(again)
        assert desk.outstanding() == []

    def test_an_end_withdraws_everything(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        desk.offer([make_batch(0), make_batch(1)])
        lease = self.take_now(others_desk, "capture-1")
        desk.end("trained enough")
        for view in (desk, others_desk):
            assert view.ended == "trained enough"
            assert view.outstanding() == []
        begun = time.monotonic()
        assert others_desk.take("capture-1", self.wait_seconds) is None
        assert time.monotonic() - begun < self.wait_seconds / 2
        others_desk.finish(lease)
        others_desk.give_back(lease)
        assert desk.outstanding() == []

    def test_an_end_wakes_who_waits(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        timer = threading.Timer(0.1, desk.end, ["enough"])
        timer.start()
        begun = time.monotonic()
        assert others_desk.take("capture-1", self.wait_seconds) is None
        assert time.monotonic() - begun < self.wait_seconds / 2
        timer.join(self.wait_seconds)

    def test_an_offer_opens_an_ended_desk(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        desk.offer([make_batch(0)])
        self.take_now(others_desk, "capture-1")
        desk.end("enough")
        desk.offer([make_batch(0), make_batch(1)])
        assert others_desk.ended is None
        assert self.take_now(others_desk, "capture-1") == Lease(batch=make_batch(0), holder="capture-1", attempt=1)
        assert desk.outstanding() == [make_batch(0), make_batch(1)]

    def test_closing_a_desk_leaves_leases_with_their_holders(self, desk: LeaseDesk, others_desk: LeaseDesk) -> None:
        desk.offer([make_batch(0)])
        self.take_now(desk, "capture-0")
        desk.close()
        desk.close()
        assert others_desk.outstanding() == [make_batch(0)]
        assert others_desk.take("capture-1", 0.3) is None

    def test_no_two_takers_get_one_batch(self, channel: RefChannel, desk: LeaseDesk) -> None:
        batches = [make_batch(number) for number in range(45)]
        desk.offer(batches)

        def take_all(holder: str) -> list[str]:
            writer, mine = channel.writer(holder), channel.leases()
            keys: list[str] = []
            while (lease := mine.take(holder, 0.2)) is not None:
                keys.append(lease.batch.key)
                mine.finish(lease)
            mine.close()
            writer.close()
            return keys

        with ThreadPoolExecutor(3) as pool:
            taken = list(pool.map(take_all, ("taker-0", "taker-1", "taker-2"), timeout=self.wait_seconds))
        assert sorted(key for keys in taken for key in keys) == sorted(batch.key for batch in batches)
        assert desk.outstanding() == []
