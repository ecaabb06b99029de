# SPDX-License-Identifier: Apache-2.0
"""What every ref channel must do while both sides live: refs arrive once, in order, unchanged, and are counted."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_core.contracts import (
    CaptureBatch,
    ChannelError,
    InFlight,
    RefChannel,
    RefReader,
    RefWriter,
    SampleRef,
    check_signature,
    sign,
)
from specforge_core.testing.channel_under_test import ChannelUnderTest
from specforge_core.testing.planted import copies_with_a_link, snapshot
from specforge_core.testing.samples import make_ref


class RefDeliverySuite(ChannelUnderTest):
    """Publishing, polling, acking."""

    def test_refs_arrive_identical_and_in_order(self, writer: RefWriter, reader: RefReader) -> None:
        refs = [make_ref(number, epoch=number % 3) for number in range(50)]
        writer.publish(refs[:20])
        writer.publish(refs[20:])
        assert self.read_all(reader, 50) == refs

    def test_unusual_refs_arrive_identical(self, writer: RefWriter, reader: RefReader) -> None:
        plain = make_ref(0)
        spec = plain.features[0]
        refs = [
            dataclasses.replace(plain, sample_id='quotes " and \\ and\nnewline', prompt_id="π — 語\x00"),
            dataclasses.replace(plain, sample_id="other id", generation=10**12, signature="ab" * 32),
            dataclasses.replace(plain, features=()),
            dataclasses.replace(plain, features=(dataclasses.replace(spec, shape=()),)),
            dataclasses.replace(plain, features=(dataclasses.replace(spec, shape=(0, 5)),), num_tokens=0),
            dataclasses.replace(plain, features=(dataclasses.replace(spec, shape=(5, 5, 5)),), num_tokens=5),
            dataclasses.replace(plain, store="elsewhere", num_tokens=77),
            dataclasses.replace(plain, features=tuple(reversed(plain.features))),
        ]
        writer.publish(refs)
        assert self.read_all(reader, len(refs)) == refs

    def test_signatures_travel(self, writer: RefWriter, reader: RefReader) -> None:
        vouched = [dataclasses.replace(make_ref(number), digest=f"{number:064x}") for number in range(3)]
        refs = [sign(ref, token="secret", run_id="run") for ref in vouched]
        writer.publish(refs)
        found = self.read_all(reader, 3)
        assert found == refs
        for ref in found:
            check_signature(ref, token="secret", run_id="run")

    def test_a_ref_says_where_it_was_read(self, writer: RefWriter, reader: RefReader) -> None:
        """Where others can write, whoever finds a forged ref must be told where it stands."""
        if not self.cross_process:
            pytest.skip("nobody else can write into this channel")
        writer.publish([make_ref(0), make_ref(1)])
        assert all("capture-0" in ref.origin for ref in self.read_all(reader, 2))

    def test_a_replayed_result_brings_nothing_back(self, channel: RefChannel, writer: RefWriter) -> None:
        """Somebody publishes a ref again that was signed, trained and acked: acked again, it is gone for good."""
        reader, stranger = channel.reader(), channel.writer("stranger")
        writer.publish([make_ref(0), make_ref(0, generation=2), make_ref(1)])
        self.read_all(reader, 3)
        reader.ack([make_ref(0).sample_id], 1)
        stranger.publish([make_ref(0)])
        assert self.read_all(reader, 1) == [make_ref(0)]
        reader.ack([make_ref(0).sample_id], 1)
        assert writer.in_flight() == InFlight(1, make_ref(1).nbytes)
        assert list(writer.published()) == [make_ref(1)]
        stranger.close()
        reader.close()

    def test_max_refs_is_respected(self, writer: RefWriter, reader: RefReader) -> None:
        refs = [make_ref(number) for number in range(7)]
        writer.publish(refs)
        assert [reader.poll(3, 1.0) for _ in range(3)] == [refs[:3], refs[3:6], refs[6:]]

    def test_nothing_is_delivered_twice(self, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([make_ref(0)])
        assert len(self.read_all(reader, 1)) == 1
        writer.publish([make_ref(1)])
        assert self.read_all(reader, 1) == [make_ref(1)]
        assert reader.poll(10, 0.05) == []

    def test_publishing_nothing_is_nothing(self, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([])
        assert reader.poll(10, 0.05) == []
        assert writer.in_flight() == InFlight(0, 0)

    def test_reader_may_come_late(self, channel: RefChannel, writer: RefWriter) -> None:
        writer.publish([make_ref(0)])
        reader = channel.reader()
        assert self.read_all(reader, 1) == [make_ref(0)]
        reader.close()

    def test_order_holds_per_writer(self, channel: RefChannel, reader: RefReader) -> None:
        writers = [channel.writer(f"capture-{index}") for index in range(3)]
        for round_ in range(5):
            for index, writer in enumerate(writers):
                writer.publish([make_ref(100 * index + round_)])
        numbers = [int(ref.prompt_id.removeprefix("prompt-")) for ref in self.read_all(reader, 15)]
        for index in range(3):
            assert [n for n in numbers if n // 100 == index] == [100 * index + round_ for round_ in range(5)]
        for writer in writers:
            writer.close()
        assert reader.poll(1, self.wait_seconds) == []
        assert reader.drained

    def test_drained_once_all_closed_and_delivered(self, channel: RefChannel, reader: RefReader) -> None:
        first, second = channel.writer("capture-0"), channel.writer("capture-1")
        first.publish([make_ref(0)])
        first.close()
        assert self.read_all(reader, 1)
        assert not reader.drained
        second.publish([make_ref(1)])
        second.close()
        assert not reader.drained
        assert self.read_all(reader, 1)
        assert reader.drained

    def test_drained_channel_does_not_wait(self, writer: RefWriter, reader: RefReader) -> None:
        writer.close()
        begun = time.monotonic()
        assert reader.poll(1, self.wait_seconds) == []
        assert time.monotonic() - begun < self.wait_seconds / 2

    def test_nobody_wrote_yet_is_not_drained(self, reader: RefReader) -> None:
        assert reader.poll(1, 0.05) == []
        assert not reader.drained

    def test_poll_waits_no_longer_than_told(self, writer: RefWriter, reader: RefReader) -> None:
        for timeout in (0.0, 0.1, 0.4):
            begun = time.monotonic()
            assert reader.poll(1, timeout) == []
            assert timeout * 0.9 <= time.monotonic() - begun < timeout + 2.0

    def test_poll_returns_as_soon_as_something_comes(self, writer: RefWriter, reader: RefReader) -> None:
        timer = threading.Timer(0.1, writer.publish, [[make_ref(0)]])
        timer.start()
        begun = time.monotonic()
        assert reader.poll(10, self.wait_seconds) == [make_ref(0)]
        assert time.monotonic() - begun < self.wait_seconds / 2
        timer.join(self.wait_seconds)

    def test_in_flight_counts_refs_and_bytes(self, writer: RefWriter, reader: RefReader) -> None:
        refs = [make_ref(number) for number in range(4)]
        writer.publish(refs)
        assert writer.in_flight() == InFlight(4, sum(ref.nbytes for ref in refs))
        self.read_all(reader, 4)
        assert writer.in_flight().refs == 4
        reader.ack([refs[0].sample_id, refs[2].sample_id], step=1)
        assert writer.in_flight() == InFlight(2, refs[1].nbytes + refs[3].nbytes)
        reader.ack([refs[0].sample_id], step=2)
        reader.ack([ref.sample_id for ref in refs], step=2)
        assert writer.in_flight() == InFlight(0, 0)

    def test_in_flight_counts_all_writers(self, channel: RefChannel, reader: RefReader) -> None:
        first, second = channel.writer("capture-0"), channel.writer("capture-1")
        first.publish([make_ref(0)])
        second.publish([make_ref(1), make_ref(2)])
        assert first.in_flight() == second.in_flight()
        assert first.in_flight().refs == 3
        self.read_all(reader, 3)
        reader.ack([make_ref(1).sample_id], step=1)
        assert first.in_flight().refs == second.in_flight().refs == 2
        first.close()
        second.close()

    def test_published_again_is_in_flight_again(self, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([make_ref(0)])
        self.read_all(reader, 1)
        reader.ack([make_ref(0).sample_id], step=1)
        writer.publish([make_ref(0, generation=2)])
        assert writer.in_flight().refs == 1
        assert self.read_all(reader, 1) == [make_ref(0, generation=2)]
        reader.ack([make_ref(0).sample_id], step=2)
        assert writer.in_flight() == InFlight(0, 0)

    @pytest.mark.parametrize("field", ["sample_id", "generation", "store", "num_tokens", "prompt_id", "epoch"])
    def test_refs_with_tensors_are_refused(self, writer: RefWriter, reader: RefReader, field: str) -> None:
        changes: dict[str, Any] = {field: torch.ones(1)}
        with pytest.raises(TypeError, match=field):
            writer.publish([make_ref(0), dataclasses.replace(make_ref(1), **changes)])
        assert reader.poll(10, 0.05) == []
        writer.publish([make_ref(2)])
        assert self.read_all(reader, 1) == [make_ref(2)]

    def test_threads_publish_while_one_polls(self, channel: RefChannel, reader: RefReader) -> None:
        def publish(index: int) -> None:
            writer = channel.writer(f"capture-{index}")
            for number in range(0, 60, 3):
                writer.publish([make_ref(1000 * index + number + offset) for offset in range(3)])
            writer.close()

        seen: list[SampleRef] = []
        deadline = time.monotonic() + self.wait_seconds
        with ThreadPoolExecutor(3) as pool:
            done = [pool.submit(publish, index) for index in range(3)]
            while len(seen) < 180 and time.monotonic() < deadline:
                fresh = reader.poll(16, 0.1)
                reader.ack([ref.sample_id for ref in fresh], step=1)
                seen += fresh
            for future in done:
                future.result(timeout=self.wait_seconds)
        assert len({ref.sample_id for ref in seen}) == len(seen) == 180

    def test_published_is_what_no_reader_acked(self, channel: RefChannel, reader: RefReader) -> None:
        first, second = channel.writer("capture-0"), channel.writer("capture-1")
        first.publish([make_ref(number) for number in range(4)])
        second.publish([make_ref(number) for number in range(10, 14)])
        self.read_all(reader, 8)
        reader.ack([make_ref(1).sample_id, make_ref(13).sample_id], step=1)
        for writer in (first, second):
            published = list(writer.published())
            assert [ref for ref in published if ref in (make_ref(0), make_ref(2), make_ref(3))] == [
                make_ref(0),
                make_ref(2),
                make_ref(3),
            ]
            assert [ref for ref in published if ref.num_tokens and int(ref.prompt_id[7:]) >= 10] == [
                make_ref(number) for number in range(10, 13)
            ]
            assert len(published) == 6
        reader.ack([ref.sample_id for ref in first.published()], step=2)
        assert list(second.published()) == []
        first.close()
        second.close()

    def test_published_knows_generations_apart(self, writer: RefWriter, reader: RefReader) -> None:
        writer.publish([make_ref(0), make_ref(1)])
        self.read_all(reader, 2)
        reader.ack([make_ref(0).sample_id], step=1)
        writer.publish([make_ref(0, generation=2), make_ref(1, generation=2)])
        assert list(writer.published()) == [make_ref(0, generation=2), make_ref(1, generation=2)]

    def test_a_planted_link_leads_nowhere(self, directory: Path, tmp_path: Path) -> None:
        """Others may write into a directory that processes share: nothing that it links to is touched."""
        self._use_as_far_as_it_goes(self.make_channel(directory))
        if not self.cross_process or not directory.exists():
            pytest.skip("this channel keeps nothing in its directory")
        for copy, outside in copies_with_a_link(directory, tmp_path):
            before = snapshot(outside)
            self._use_as_far_as_it_goes(self.make_channel(copy))
            assert snapshot(outside) == before, f"the channel followed {copy}'s link to {outside}"

    def _use_as_far_as_it_goes(self, channel: RefChannel) -> None:
        with suppress(ChannelError), closing(channel.writer("capture-0")) as writer:
            writer.publish([make_ref(0), make_ref(1)])
            with suppress(ChannelError), closing(channel.reader()) as reader:
                reader.ack([ref.sample_id for ref in reader.poll(1, self.wait_seconds)], step=1)
            with suppress(ChannelError), closing(channel.leases()) as desk:
                desk.offer([CaptureBatch(split="train", epoch=0, first=0, count=1)])
                desk.take("capture-0", 0.0)
            writer.in_flight()
        with suppress(ChannelError):
            channel.seal()
