# SPDX-License-Identifier: Apache-2.0
"""How the two sides of a file channel die inside one process: the kernel closes a dead process's files, no more.

Real processes are really killed in tests/fault.
"""

from __future__ import annotations

from specforge_core.contracts import RefReader, RefWriter
from specforge_core.features.file_ref_reader import FileRefReader
from specforge_core.features.file_ref_writer import FileRefWriter


def kill_file_writer(writer: RefWriter) -> None:
    assert isinstance(writer, FileRefWriter)
    writer._ended = True
    writer._heartbeat.stop()
    writer._file.close()


def kill_file_reader(reader: RefReader) -> None:
    assert isinstance(reader, FileRefReader)
    assert reader._file is not None
    reader._closed = True
    reader._heartbeat.stop()
    reader._file.close()
