# SPDX-License-Identifier: Apache-2.0
"""The ref channel contract on the built-in channels; broken ones are in ``test_ref_channel_controls``."""

from __future__ import annotations

from pathlib import Path

from dying_files import kill_file_reader, kill_file_writer
from specforge_core.contracts import PartContext, RefChannel, RefReader, RefWriter
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.hooks.builtin import FileChannelConfig, MemoryChannelConfig
from specforge_core.testing.ref_channel_suite import RefChannelSuite


def context(directory: Path) -> PartContext:
    return PartContext(run_id="run", directory=directory)


class TestMemoryChannel(RefChannelSuite):
    def make_channel(self, directory: Path) -> RefChannel:
        return MemoryChannel(MemoryChannelConfig(name="memory"), context(directory))


class TestFileChannel(RefChannelSuite):
    replayable = True
    cross_process = True

    def make_channel(self, directory: Path) -> RefChannel:
        return FileChannel(FileChannelConfig(name="file"), context(directory))

    def kill_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        kill_file_writer(writer)

    def kill_reader(self, channel: RefChannel, reader: RefReader) -> None:
        kill_file_reader(reader)
