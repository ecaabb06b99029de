# SPDX-License-Identifier: Apache-2.0
"""What every ref channel must do when a side ends: closes, fails, dies, comes back, or is sealed."""

from __future__ import annotations

import threading

import pytest

from specforge_core.contracts import ChannelError, ChannelFailed, PeerDied, RefChannel, RefReader, RefWriter
from specforge_core.testing.channel_under_test import ChannelUnderTest
from specforge_core.testing.samples import make_ref


class ChannelEndingSuite(ChannelUnderTest):
    """Closing, failing, dying, sealing, and reading again."""

    def test_writer_failure_reaches_the_reader(self, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([make_ref(0)])
        writer.fail("the target ran out of memory")
        with pytest.raises(ChannelFailed, match="the target ran out of memory"):
            reader.poll(1, self.wait_seconds)
        assert not reader.drained

    def test_writer_failure_ends_a_waiting_poll(self, writer: RefWriter, reader: RefReader) -> None:
        timer = threading.Timer(0.1, writer.fail, ["gone"])
        timer.start()
        with pytest.raises(ChannelFailed, match="gone"):
            reader.poll(1, self.wait_seconds)
        timer.join(self.wait_seconds)

    def test_reader_failure_reaches_every_writer(self, channel: RefChannel, reader: RefReader) -> None:
        writers = [channel.writer(f"capture-{index}") for index in range(2)]
        reader.fail("the loss is not a number")
        for writer in writers:
            with pytest.raises(ChannelFailed, match="the loss is not a number"):
                writer.publish([make_ref(0)])
            with pytest.raises(ChannelFailed, match="the loss is not a number"):
                writer.in_flight()
            writer.close()

    def test_closed_writer_refuses(self, writer: RefWriter) -> None:
        writer.close()
        writer.close()
        with pytest.raises(ChannelError):
            writer.publish([make_ref(0)])

    def test_closing_after_failing_does_not_hide_it(self, writer: RefWriter, reader: RefReader) -> None:
        writer.fail("first")
        writer.close()
        writer.fail("second")
        with pytest.raises(ChannelFailed, match="first"):
            reader.poll(1, self.wait_seconds)

    def test_closed_reader_refuses(self, reader: RefReader) -> None:
        reader.close()
        reader.close()
        with pytest.raises(ChannelError):
            reader.poll(1, 0.0)

    def test_reopened_writer_goes_on(self, channel: RefChannel, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([make_ref(0), make_ref(1)])
        writer.fail("interrupted")
        again = channel.writer("capture-0")
        assert list(again.published()) == [make_ref(0), make_ref(1)]
        assert again.in_flight().refs == 2
        again.publish([make_ref(2)])
        assert list(again.published()) == [make_ref(0), make_ref(1), make_ref(2)]
        assert self.read_all(reader, 3) == [make_ref(0), make_ref(1), make_ref(2)]
        again.close()
        assert reader.poll(1, self.wait_seconds) == []
        assert reader.drained

    def test_a_failure_is_told_to_the_reader_of_that_time_only(self, channel: RefChannel, writer: RefWriter) -> None:
        writer.publish([make_ref(0)])
        writer.fail("the target ran out of memory")
        reader = channel.reader()
        assert self.read_all(reader, 1) == [make_ref(0)]
        with pytest.raises(PeerDied):
            reader.poll(1, self.wait_seconds)
        again = channel.writer("capture-1")
        assert reader.poll(1, 0.05) == []
        again.publish([make_ref(1)])
        assert self.read_all(reader, 1) == [make_ref(1)]
        again.fail("and again")
        with pytest.raises(ChannelFailed, match="and again"):
            reader.poll(1, self.wait_seconds)
        reader.close()

    def test_a_readers_failure_does_not_stop_its_successor(self, channel: RefChannel, reader: RefReader) -> None:
        reader.fail("out of memory")
        reader.close()
        successor = channel.reader()
        writer = channel.writer("capture-0")
        writer.publish([make_ref(0)])
        assert writer.in_flight().refs == 1
        assert self.read_all(successor, 1) == [make_ref(0)]
        writer.close()
        successor.close()

    def test_a_failed_reader_that_closes_has_still_failed(self, writer: RefWriter, reader: RefReader) -> None:
        reader.fail("the loss is not a number")
        reader.close()
        with pytest.raises(ChannelFailed, match="the loss is not a number"):
            writer.publish([make_ref(0)])

    def test_sealing_closes_what_ended_without_closing(
        self, channel: RefChannel, opened_again: RefChannel, writer: RefWriter
    ) -> None:
        done = channel.writer("capture-1")
        writer.publish([make_ref(0)])
        done.publish([make_ref(1)])
        done.close()
        writer.fail("interrupted")
        opened_again.seal()
        reader = channel.reader()
        assert sorted(ref.prompt_id for ref in self.read_all(reader, 2)) == ["prompt-0", "prompt-1"]
        assert reader.poll(1, self.wait_seconds) == []
        assert reader.drained
        reader.close()

    def test_sealing_leaves_living_writers_open(self, channel: RefChannel, writer: RefWriter) -> None:
        channel.seal()
        reader = channel.reader()
        assert reader.poll(1, 0.05) == []
        assert not reader.drained
        writer.publish([make_ref(0)])
        assert self.read_all(reader, 1) == [make_ref(0)]
        writer.close()
        channel.seal()
        assert reader.poll(1, self.wait_seconds) == []
        assert reader.drained
        reader.close()

    def test_a_dead_writer_is_noticed_after_what_it_published(
        self, channel: RefChannel, writer: RefWriter, reader: RefReader
    ) -> None:
        writer.publish([make_ref(0), make_ref(1)])
        assert reader.poll(1, self.wait_seconds) == [make_ref(0)]
        self.kill_writer(channel, writer)
        assert reader.poll(1, self.wait_seconds) == [make_ref(1)]
        assert self.raised_in_time(lambda: reader.poll(1, 0.1), PeerDied)
        assert not reader.drained

    def test_one_living_writer_is_enough(self, channel: RefChannel, writer: RefWriter, reader: RefReader) -> None:
        doomed = channel.writer("capture-1")
        doomed.publish([make_ref(0)])
        self.kill_writer(channel, doomed)
        assert self.read_all(reader, 1) == [make_ref(0)]
        assert reader.poll(1, 0.5) == []
        writer.close()
        assert self.raised_in_time(lambda: reader.poll(1, 0.1), PeerDied)

    def test_sealing_closes_a_dead_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        writer.publish([make_ref(0)])
        self.kill_writer(channel, writer)
        channel.seal()
        reader = channel.reader()
        assert self.read_all(reader, 1) == [make_ref(0)]
        assert reader.poll(1, self.wait_seconds) == []
        assert reader.drained
        reader.close()

    def test_a_dead_reader_stops_nobody_from_publishing(
        self, channel: RefChannel, writer: RefWriter, reader: RefReader
    ) -> None:
        writer.publish([make_ref(0)])
        assert writer.in_flight().refs == 1
        self.kill_reader(channel, reader)
        assert self.raised_in_time(writer.in_flight, PeerDied)
        writer.publish([make_ref(1)])
        successor = channel.reader()
        assert writer.in_flight().refs == 2
        assert self.read_all(successor, 2 if self.replayable else 1)[-1] == make_ref(1)
        successor.close()

    def test_a_later_reader_gets_what_nobody_acked(
        self, channel: RefChannel, opened_again: RefChannel, writer: RefWriter
    ) -> None:
        self._require_replayable()
        refs = [make_ref(number) for number in range(6)]
        writer.publish(refs)
        former = channel.reader()
        assert former.poll(4, self.wait_seconds) == refs[:4]
        former.ack([refs[0].sample_id, refs[2].sample_id], step=1)
        former.close()
        writer.publish([make_ref(0, generation=2)])
        later = opened_again.reader()
        assert self.read_all(later, 5) == [refs[1], *refs[3:], make_ref(0, generation=2)]
        later.ack([ref.sample_id for ref in refs], step=2)
        assert writer.in_flight().refs == 0
        later.close()
        last = channel.reader()
        assert last.poll(10, 0.1) == []
        writer.publish([make_ref(7)])
        assert self.read_all(last, 1) == [make_ref(7)]
        last.close()

    def test_a_sealed_channel_is_read_in_full_until_it_is_acked(self, channel: RefChannel, writer: RefWriter) -> None:
        self._require_replayable()
        refs = [make_ref(number) for number in range(5)]
        writer.publish(refs)
        writer.close()
        for _ in range(3):
            reader = channel.reader()
            assert self.read_all(reader, 5) == refs
            assert reader.drained
            reader.close()
        reader = channel.reader()
        assert self.read_all(reader, 5) == refs
        reader.ack([ref.sample_id for ref in refs], step=1)
        reader.close()
        reader = channel.reader()
        assert reader.poll(10, self.wait_seconds) == []
        assert reader.drained
        reader.close()

    def _require_replayable(self) -> None:
        if not self.replayable:
            pytest.skip("this channel is not replayable")
