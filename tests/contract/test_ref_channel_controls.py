# SPDX-License-Identifier: Apache-2.0
"""Broken ref channels that the contract suite must reject, each by the test that is there for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dying_files import kill_file_reader, kill_file_writer
from specforge_core.contracts import (
    CaptureBatch,
    ChannelError,
    ChannelFailed,
    InFlight,
    Lease,
    LeaseDesk,
    PartContext,
    PeerDied,
    RefChannel,
    RefReader,
    RefWriter,
    SampleRef,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.hooks.builtin import FileChannelConfig, MemoryChannelConfig
from specforge_core.testing.conformance import assert_rejected
from specforge_core.testing.ref_channel_suite import RefChannelSuite


class Wrapped(RefChannel):
    """A good channel whose sides and desk may be replaced by broken ones."""

    writer_class: Callable[[RefWriter], RefWriter] | None = None
    reader_class: Callable[[RefReader], RefReader] | None = None
    desk_class: Callable[[LeaseDesk], LeaseDesk] | None = None

    def __init__(self, inner: RefChannel) -> None:
        self.inner = inner

    def writer(self, name: str) -> RefWriter:
        writer = self.inner.writer(name)
        return type(self).writer_class(writer) if type(self).writer_class else writer

    def reader(self) -> RefReader:
        reader = self.inner.reader()
        return type(self).reader_class(reader) if type(self).reader_class else reader

    def leases(self) -> LeaseDesk:
        desk = self.inner.leases()
        return type(self).desk_class(desk) if type(self).desk_class else desk

    def seal(self) -> None:
        self.inner.seal()


class WrappedSuite(RefChannelSuite):
    channel_class: type[Wrapped]
    wait_seconds = 2.0
    replayable = True
    cross_process = True

    def make_channel(self, directory: Path) -> RefChannel:
        return self.channel_class(
            FileChannel(FileChannelConfig(name="file", path=directory), PartContext(run_id="run", directory=directory))
        )

    def kill_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        kill_file_writer(writer.inner if isinstance(writer, PassingWriter) else writer)

    def kill_reader(self, channel: RefChannel, reader: RefReader) -> None:
        kill_file_reader(reader.inner if isinstance(reader, PassingReader) else reader)


class PassingWriter(RefWriter):
    def __init__(self, inner: RefWriter) -> None:
        self.inner = inner

    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish(refs)

    def in_flight(self) -> InFlight:
        return self.inner.in_flight()

    def published(self) -> Sequence[SampleRef]:
        return self.inner.published()

    def close(self) -> None:
        self.inner.close()

    def fail(self, reason: str) -> None:
        self.inner.fail(reason)


class PassingReader(RefReader):
    def __init__(self, inner: RefReader) -> None:
        self.inner = inner

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        return self.inner.poll(max_refs, timeout)

    @property
    def drained(self) -> bool:
        return self.inner.drained

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        self.inner.ack(sample_ids, step)

    def fail(self, reason: str) -> None:
        self.inner.fail(reason)

    def close(self) -> None:
        self.inner.close()


class Digestless(PassingWriter):
    """Loses what the signature vouches for."""

    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish([replace(ref, digest="") for ref in refs])


class Reversing(PassingWriter):
    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish(list(reversed(refs)))


class Unchecked(PassingWriter):
    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish([ref for ref in refs if type(ref.sample_id) is str and type(ref.num_tokens) is int])


class HalfPublishing(PassingWriter):
    """Publishes one by one, so that a refused batch is published in part."""

    def publish(self, refs: Sequence[SampleRef]) -> None:
        for ref in refs:
            self.inner.publish([ref])


class OwnCount(PassingWriter):
    """Counts what this writer published, not what the channel's writers did."""

    count = 0

    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish(refs)
        self.count += len(refs)

    def in_flight(self) -> InFlight:
        return InFlight(self.count, self.inner.in_flight().nbytes)


class Deaf(PassingWriter):
    """Never hears of the reader's failure."""

    def in_flight(self) -> InFlight:
        try:
            return self.inner.in_flight()
        except ChannelFailed:
            return InFlight(0, 0)


class Resurrecting(PassingWriter):
    def publish(self, refs: Sequence[SampleRef]) -> None:
        try:
            self.inner.publish(refs)
        except ChannelFailed:
            raise
        except ChannelError:
            pass


class Forgetting(PassingWriter):
    def published(self) -> Sequence[SampleRef]:
        return []


class Silent(PassingWriter):
    """Closes where it should fail."""

    def fail(self, reason: str) -> None:
        self.inner.close()


class Overfull(PassingReader):
    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        return self.inner.poll(max_refs + 1, timeout)


class Repeating(PassingReader):
    last: Sequence[SampleRef] = ()

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        refs = [*self.last, *self.inner.poll(max_refs, timeout)]
        self.last = refs[-1:]
        return refs


class Unlocated(PassingReader):
    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        return [replace(ref, origin="") for ref in self.inner.poll(max_refs, timeout)]


class Sleepy(PassingReader):
    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        time.sleep(2.2)
        return self.inner.poll(max_refs, 0)


class Impatient(PassingReader):
    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        return self.inner.poll(max_refs, 0)


class Hasty(PassingReader):
    """Drained as soon as nothing is waiting."""

    @property
    def drained(self) -> bool:
        return True


class Unacking(PassingReader):
    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        list(sample_ids)


class Mute(PassingReader):
    def fail(self, reason: str) -> None:
        pass


class FailingOnDeath(PassingWriter):
    """Takes a reader's death for its failure."""

    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.in_flight()
        self.inner.publish(refs)


class OnlyOwn(PassingWriter):
    """Says that only what it published itself was published."""

    def __init__(self, inner: RefWriter) -> None:
        super().__init__(inner)
        self.own: list[SampleRef] = []

    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish(refs)
        self.own += refs

    def published(self) -> Sequence[SampleRef]:
        return [ref for ref in self.inner.published() if ref in self.own]


class Unsigned(PassingWriter):
    def publish(self, refs: Sequence[SampleRef]) -> None:
        self.inner.publish([replace(ref, signature="") for ref in refs])


class Oblivious(PassingReader):
    """Hides that every writer died."""

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        try:
            return self.inner.poll(max_refs, timeout)
        except PeerDied:
            return []


class Panicking(PassingReader):
    """Takes one writer's death for everybody's."""

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        refs = self.inner.poll(max_refs, timeout)
        if not refs and not self.inner.drained:
            raise PeerDied("somebody may have died")
        return refs


class PassingDesk(LeaseDesk):
    def __init__(self, inner: LeaseDesk) -> None:
        self.inner = inner

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        self.inner.offer(batches)

    def take(self, holder: str, timeout: float) -> Lease | None:
        return self.inner.take(holder, timeout)

    def finish(self, lease: Lease) -> None:
        self.inner.finish(lease)

    def give_back(self, lease: Lease) -> None:
        self.inner.give_back(lease)

    def outstanding(self) -> list[CaptureBatch]:
        return self.inner.outstanding()

    def end(self, reason: str) -> None:
        self.inner.end(reason)

    @property
    def ended(self) -> str | None:
        return self.inner.ended

    def close(self) -> None:
        self.inner.close()


class Generous(PassingDesk):
    """Hands what somebody holds to the next who asks."""

    def take(self, holder: str, timeout: float) -> Lease | None:
        lease = self.inner.take(holder, timeout)
        if lease is None and self.inner.outstanding():
            return Lease(batch=self.inner.outstanding()[0], holder=holder, attempt=1)
        return lease


class Racing(PassingDesk):
    """Looks, and takes later what it saw."""

    def take(self, holder: str, timeout: float) -> Lease | None:
        seen = self.inner.outstanding()
        time.sleep(0.001)
        lease = self.inner.take(holder, timeout)
        return replace(lease, batch=seen[0]) if lease is not None and seen else lease


class Forgetful(PassingDesk):
    """Forgets a batch once it was taken, so that what a dead holder held never comes back."""

    def take(self, holder: str, timeout: float) -> Lease | None:
        lease = self.inner.take(holder, timeout)
        if lease is not None:
            self.inner.finish(lease)
        return lease


class Backwards(PassingDesk):
    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        self.inner.offer(list(reversed(batches)))


class Uncounting(PassingDesk):
    def take(self, holder: str, timeout: float) -> Lease | None:
        lease = self.inner.take(holder, timeout)
        return None if lease is None else replace(lease, attempt=1)


class Keeping(PassingDesk):
    """Keeps what is given back."""

    def give_back(self, lease: Lease) -> None:
        pass


class Losing(PassingDesk):
    """What is given back is gone, and must be offered again."""

    def give_back(self, lease: Lease) -> None:
        self.inner.finish(lease)
        self.inner.offer([lease.batch])


class Trusting(PassingDesk):
    """Whoever says that a batch is finished is believed."""

    def finish(self, lease: Lease) -> None:
        left = [batch for batch in self.inner.outstanding() if batch != lease.batch]
        self.inner.end("")
        self.inner.offer(left)


class Endless(PassingDesk):
    def end(self, reason: str) -> None:
        pass


class EndedForGood(PassingDesk):
    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        if self.inner.ended is None:
            self.inner.offer(batches)


class Restless(PassingDesk):
    def take(self, holder: str, timeout: float) -> Lease | None:
        return self.inner.take(holder, 0.0)


CONTROLS: list[tuple[Any, str]] = [
    (Reversing, "test_refs_arrive_identical_and_in_order"),
    (Unchecked, "test_refs_with_tensors_are_refused"),
    (HalfPublishing, "test_refs_with_tensors_are_refused"),
    (OwnCount, "test_in_flight_counts_all_writers"),
    (Deaf, "test_reader_failure_reaches_every_writer"),
    (Resurrecting, "test_closed_writer_refuses"),
    (Forgetting, "test_reopened_writer_goes_on"),
    (Silent, "test_writer_failure_reaches_the_reader"),
    (Overfull, "test_max_refs_is_respected"),
    (Repeating, "test_nothing_is_delivered_twice"),
    (Sleepy, "test_poll_waits_no_longer_than_told"),
    (Impatient, "test_poll_waits_no_longer_than_told"),
    (Hasty, "test_nobody_wrote_yet_is_not_drained"),
    (Unacking, "test_in_flight_counts_refs_and_bytes"),
    (Mute, "test_reader_failure_reaches_every_writer"),
    (FailingOnDeath, "test_a_dead_reader_stops_nobody_from_publishing"),
    (OnlyOwn, "test_published_is_what_no_reader_acked"),
    (Unsigned, "test_signatures_travel"),
    (Digestless, "test_signatures_travel"),
    (Unlocated, "test_a_ref_says_where_it_was_read"),
    (Unacking, "test_a_replayed_result_brings_nothing_back"),
    (Oblivious, "test_a_dead_writer_is_noticed_after_what_it_published"),
    (Panicking, "test_one_living_writer_is_enough"),
    (Generous, "test_a_living_holder_keeps_its_lease"),
    (Racing, "test_no_two_takers_get_one_batch"),
    (Forgetful, "test_what_a_dead_holder_held_comes_back"),
    (Forgetful, "test_a_holder_that_closed_its_writer_is_gone"),
    (Backwards, "test_batches_are_taken_identical_and_in_order"),
    (Uncounting, "test_a_holder_that_failed_is_gone"),
    (Keeping, "test_what_is_given_back_is_taken_first"),
    (Losing, "test_what_is_given_back_is_taken_first"),
    (Trusting, "test_a_lost_lease_cannot_be_finished"),
    (Endless, "test_an_end_withdraws_everything"),
    (Endless, "test_an_end_wakes_who_waits"),
    (EndedForGood, "test_an_offer_opens_an_ended_desk"),
    (Unacking, "test_a_later_reader_gets_what_nobody_acked"),
    (Restless, "test_a_take_returns_as_soon_as_something_is_offered"),
]


@pytest.mark.parametrize(("broken", "by"), CONTROLS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_channels_are_rejected(broken: Any, by: str) -> None:
    class BrokenChannel(Wrapped):
        writer_class = broken if issubclass(broken, RefWriter) else None
        reader_class = broken if issubclass(broken, RefReader) else None
        desk_class = broken if issubclass(broken, LeaseDesk) else None

    class BrokenSuite(WrappedSuite):
        channel_class = BrokenChannel

    assert_rejected(BrokenSuite, by=by)


def test_a_channel_that_does_not_seal_is_rejected() -> None:
    class Unsealing(Wrapped):
        def seal(self) -> None:
            pass

    class BrokenSuite(WrappedSuite):
        channel_class = Unsealing

    assert_rejected(BrokenSuite, by="test_sealing_closes_what_ended_without_closing")
    assert_rejected(BrokenSuite, by="test_sealing_closes_a_dead_writer")


def test_a_channel_that_closes_living_writers_is_rejected() -> None:
    class Closing(Wrapped):
        def writer(self, name: str) -> RefWriter:
            self.last = super().writer(name)
            return self.last

        def seal(self) -> None:
            self.last.close()

    class BrokenSuite(WrappedSuite):
        channel_class = Closing

    assert_rejected(BrokenSuite, by="test_sealing_leaves_living_writers_open")


def test_a_channel_that_follows_planted_links_is_rejected() -> None:
    class Noting(Wrapped):
        """Notes who opened it, wherever that name leads."""

        def writer(self, name: str) -> RefWriter:
            assert isinstance(self.inner, FileChannel)
            writer = super().writer(name)
            with (self.inner._directory() / "writers.txt").open("a") as file:
                file.write(f"{name}\n")
            return writer

    class BrokenSuite(WrappedSuite):
        channel_class = Noting

    assert_rejected(BrokenSuite, by="test_a_planted_link_leads_nowhere")


def test_a_desk_of_each_openers_own_is_rejected() -> None:
    class Apart(Wrapped):
        def leases(self) -> LeaseDesk:
            own = MemoryChannel(MemoryChannelConfig(name="memory"), PartContext(run_id="run", directory=Path()))
            self.writers = [own.writer(f"capture-{number}") for number in range(2)]
            return own.leases()

    class BrokenSuite(WrappedSuite):
        channel_class = Apart

    assert_rejected(BrokenSuite, by="test_outstanding_is_offered_and_not_finished")


def test_a_channel_that_claims_to_be_replayable_is_rejected() -> None:
    class BrokenSuite(RefChannelSuite):
        replayable = True
        wait_seconds = 2.0

        def make_channel(self, directory: Path) -> RefChannel:
            return MemoryChannel(MemoryChannelConfig(name="memory"), PartContext(run_id="run", directory=directory))

    assert_rejected(BrokenSuite, by="test_a_later_reader_gets_what_nobody_acked")


@pytest.mark.parametrize("by", sorted({by for _, by in CONTROLS if by not in RefChannelSuite.thorough}))
def test_the_wrapper_alone_is_not_rejected(by: str) -> None:
    class Sound(WrappedSuite):
        channel_class = Wrapped
        wait_seconds = RefChannelSuite.wait_seconds

    with pytest.raises(AssertionError, match="did not fail"):
        assert_rejected(Sound, by=by)
