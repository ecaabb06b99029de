# SPDX-License-Identifier: Apache-2.0
"""Refs as append-only files in a directory, which may be a shared mount: one file per writer, one per reader.

Nothing is ever rewritten. A writer appends to ``<name>.refs`` and syncs once per batch; the reader follows every such
file and appends what it trained to a file of its own, which the writers follow in turn. Each keeps its file locked, so
that the other side notices a process that died. Acks stay, so whoever reads next gets what nobody acked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from specforge_core.contracts import ChannelError, PartContext, RefChannel
from specforge_core.contracts.files import make_directory
from specforge_core.features.channel_seal import close_abandoned
from specforge_core.features.channel_tails import WRITER_SUFFIX
from specforge_core.features.file_leases import FileLeases
from specforge_core.features.file_ref_reader import FileRefReader
from specforge_core.features.file_ref_writer import FileRefWriter
from specforge_core.features.identity import file_name_problem
from specforge_core.features.shared_directory import SharedDirectory

if TYPE_CHECKING:
    from specforge_core.hooks.builtin import FileChannelConfig


class FileChannel(RefChannel):
    """A directory of record files."""

    def __init__(self, config: FileChannelConfig, context: PartContext) -> None:
        self._shared = SharedDirectory(config.path, default=context.directory / "refs", holds="refs and leases")
        self._timeout_seconds = config.writer_timeout_seconds

    def writer(self, name: str) -> FileRefWriter:
        """:raises ChannelError: a name that cannot be a file's, or one that a living process writes under."""
        problem = file_name_problem(name)
        if problem:
            raise ChannelError(f"writer {name[:80]!r} cannot name a file: {problem}", where=str(self._shared.path))
        path = self._directory() / (name + WRITER_SUFFIX)
        try:
            make_directory(path.parent)
            return FileRefWriter(path, timeout_seconds=self._timeout_seconds)
        except OSError as error:
            raise ChannelError(
                f"cannot be written: {error.strerror}", where=str(path), hint="check channel.path and its permissions"
            ) from error

    def reader(self) -> FileRefReader:
        return FileRefReader(self._directory(), timeout_seconds=self._timeout_seconds)

    def leases(self) -> FileLeases:
        return FileLeases(self._directory(), timeout_seconds=self._timeout_seconds)

    def seal(self) -> None:
        """May wait as long as a writer may be silent: that is how a death on a machine whose locks are not seen shows.

        :raises ChannelError: a file that should be closed cannot be written.
        """
        close_abandoned(sorted(self._directory().glob(f"*{WRITER_SUFFIX}")), timeout_seconds=self._timeout_seconds)

    def _directory(self) -> Path:
        """:raises ChannelError: it is a link that nobody chose."""
        try:
            self._shared.check()
        except OSError as error:
            raise ChannelError(f"cannot be used: {error.strerror}", where=str(self._shared.path)) from error
        return self._shared.path
