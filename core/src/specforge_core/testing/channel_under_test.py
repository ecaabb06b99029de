# SPDX-License-Identifier: Apache-2.0
"""What the suites of a ref channel share: the factory, what a channel says of itself, and its two sides as fixtures."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specforge_core.contracts import RefChannel, RefReader, RefWriter, SampleRef
from specforge_core.testing.conformance import ContractSuite

WAIT_SECONDS = 20.0


def read_all(reader: RefReader, count: int, *, seconds: float = WAIT_SECONDS) -> list[SampleRef]:
    """Poll until ``count`` refs came, the channel is drained or time is up."""
    refs: list[SampleRef] = []
    deadline = time.monotonic() + seconds
    while len(refs) < count and time.monotonic() < deadline:
        fresh = reader.poll(1000, 0.2)
        refs += fresh
        if not fresh and reader.drained:
            break
    return refs


class ChannelUnderTest(ContractSuite):
    """A subclass provides ``make_channel`` and says what else its channel can do."""

    replayable = False
    """As the descriptor says: refs that no reader acked are read again by a later reader."""
    cross_process = False
    """As the descriptor says. Then ``make_channel`` of a directory it knows opens that channel again."""

    wait_seconds = WAIT_SECONDS
    """How long a test waits for what must come; a negative control waits for what does not."""

    @abstractmethod
    def make_channel(self, directory: Path) -> RefChannel:
        """A new channel in an empty directory."""

    def kill_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        """End a writer as the death of its process would: without a word. Its ``close`` then does nothing."""
        pytest.skip("this suite was not told how a writer dies")

    def kill_reader(self, channel: RefChannel, reader: RefReader) -> None:
        """End a reader as the death of its process would. Its ``close`` then does nothing."""
        pytest.skip("this suite was not told how a reader dies")

    def read_all(self, reader: RefReader, count: int) -> list[SampleRef]:
        """Poll until ``count`` refs came, the channel is drained or time is up."""
        return read_all(reader, count, seconds=self.wait_seconds)

    def raised_in_time(self, call: Callable[[], object], expected: type[Exception]) -> bool:
        """Whether ``call``, made again and again, raised that error before time was up."""
        deadline = time.monotonic() + self.wait_seconds
        while time.monotonic() < deadline:
            try:
                call()
            except expected:
                return True
            time.sleep(0.02)
        return False

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "refs"

    @pytest.fixture
    def channel(self, directory: Path) -> RefChannel:
        return self.make_channel(directory)

    @pytest.fixture
    def opened_again(self, channel: RefChannel, directory: Path) -> RefChannel:
        """The channel as another process has it, where it crosses processes."""
        return self.make_channel(directory) if self.cross_process else channel

    @pytest.fixture
    def writer(self, channel: RefChannel) -> Iterator[RefWriter]:
        writer = channel.writer("capture-0")
        yield writer
        writer.close()

    @pytest.fixture
    def reader(self, channel: RefChannel) -> Iterator[RefReader]:
        reader = channel.reader()
        yield reader
        reader.close()
