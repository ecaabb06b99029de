# SPDX-License-Identifier: Apache-2.0
"""The ref channel contract on the built-in channels, and on broken ones that it must reject."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    InFlight,
    LeaseDesk,
    PartContext,
    RefChannel,
    RefReader,
    RefWriter,
    SampleRef,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_ref_reader import FileRefReader
from specforge_core.features.file_ref_writer import FileRefWriter
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.hooks.builtin import FileChannelConfig, MemoryChannelConfig
from specforge_core.testing.conformance import assert_rejected
from specforge_core.testing.ref_channel_suite import RefChannelSuite


def context(directory: Path) -> PartContext:
    return PartContext(run_id="run", directory=directory)


def memory_channel(directory: Path) -> MemoryChannel:
    return MemoryChannel(MemoryChannelConfig(name="memory"), context(directory))


class TestMemoryChannel(RefChannelSuite):
    def make_channel(self, directory: Path) -> RefChannel:
        return memory_channel(directory)


class TestFileChannel(RefChannelSuite):
    replayable = True
    cross_process = True

    def make_channel(self, directory: Path) -> RefChannel:
        return FileChannel(FileChannelConfig(name="file"), context(directory))

    def kill_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        """The kernel closes a dead process's files; real processes are really killed in tests/fault."""
        assert isinstance(writer, FileRefWriter)
        writer._ended = True
        writer._heartbeat.stop()
        writer._file.close()

    def kill_reader(self, channel: RefChannel, reader: RefReader) -> None:
        assert isinstance(reader, FileRefReader)
        assert reader._file is not None
        reader._closed = True
        reader._heartbeat.stop()
        reader._file.close()


class Wrapped(RefChannel):
    """A good channel whose two sides may be replaced by broken ones."""

    writer_class: Callable[[RefWriter], RefWriter] | None = None
    reader_class: Callable[[RefReader], RefReader] | None = None

    def __init__(self, inner: RefChannel) -> None:
        self.inner = inner

    def writer(self, name: str) -> RefWriter:
        writer = self.inner.writer(name)
        return type(self).writer_class(writer) if type(self).writer_class else writer

    def reader(self) -> RefReader:
        reader = self.inner.reader()
        return type(self).reader_class(reader) if type(self).reader_class else reader

    def leases(self) -> LeaseDesk:
        return self.inner.leases()

    def seal(self) -> None:
        self.inner.seal()


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
]


@pytest.mark.parametrize(("broken", "by"), CONTROLS, ids=lambda value: getattr(value, "__name__", ""))
def test_broken_channels_are_rejected(broken: Any, by: str) -> None:
    class BrokenChannel(Wrapped):
        writer_class = broken if issubclass(broken, RefWriter) else None
        reader_class = broken if issubclass(broken, RefReader) else None

    class BrokenSuite(RefChannelSuite):
        def make_channel(self, directory: Path) -> RefChannel:
            return BrokenChannel(memory_channel(directory))

    assert_rejected(BrokenSuite, by=by)


def test_a_channel_that_claims_to_be_replayable_is_rejected() -> None:
    class BrokenSuite(TestMemoryChannel):
        replayable = True

    assert_rejected(BrokenSuite, by="test_a_later_reader_gets_what_nobody_acked")


def test_the_wrapper_alone_is_not_rejected() -> None:
    class WrappedSuite(RefChannelSuite):
        def make_channel(self, directory: Path) -> RefChannel:
            return Wrapped(memory_channel(directory))

    with pytest.raises(AssertionError, match="did not fail"):
        assert_rejected(WrappedSuite, by="test_refs_arrive_identical_and_in_order")
