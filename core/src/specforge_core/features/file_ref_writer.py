# SPDX-License-Identifier: Apache-2.0
"""The capture side of a file channel: appends refs to one file and follows what the reader says of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from specforge_core.contracts import ChannelError, InFlight, RefWriter, SampleRef
from specforge_core.features.channel_tails import VERSION_FRAME, WriterTail
from specforge_core.features.file_lock import opened_by
from specforge_core.features.liveness import Heartbeat
from specforge_core.features.record_file import RecordAppender, frame
from specforge_core.features.ref_codec import RefEncoder
from specforge_core.features.unacked import InFlightCount, ReaderWatch, read_unacked

_REFS_PER_RECORD = 4096


class FileRefWriter(RefWriter):
    """Appends refs to one file. Thread-safe. Remembers nothing of what it published."""

    def __init__(self, path: Path, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._lock = threading.RLock()
        self._file = RecordAppender(path)
        self._opened = False
        self._ended = False
        self._count: InFlightCount | None = None
        try:
            self._continue()
            self._reader = ReaderWatch(path.parent, timeout_seconds=timeout_seconds)
        except ChannelError:
            self._file.close()
            raise
        self._heartbeat = Heartbeat(self._file, timeout_seconds=timeout_seconds)

    def _continue(self) -> None:
        """Go on after what an earlier writer of this name left."""
        before = WriterTail(self._file.path, timeout_seconds=self._timeout_seconds)
        try:
            while before.read():
                pass
            self._new = self._file.size == 0
            self._encoder = RefEncoder(before.layouts)
        finally:
            before.close()
        # A closed file stays closed until there is something to add: opening it again must not unseal the channel.
        if before.state != "closed":
            self._append([])

    def publish(self, refs: Sequence[SampleRef]) -> None:
        with self._lock:
            self._refuse_ended()
            self._reader.raise_if_failed()
            encoder = self._encoder.copy()
            frames: list[bytes] = []
            for first in range(0, len(refs), _REFS_PER_RECORD):
                try:
                    layouts, batch = encoder.encode_batch(refs[first : first + _REFS_PER_RECORD])
                except ValueError as error:
                    raise ChannelError(str(error), where=str(self._file.path)) from error
                frames += [*(frame("L", layout) for layout in layouts), frame("R", batch)]
            if frames:
                self._append(frames)
                self._encoder = encoder

    def in_flight(self) -> InFlight:
        with self._lock:
            self._refuse_ended()
            self._reader.raise_if_failed()
            self._reader.raise_if_dead()
            if self._count is None:
                self._count = InFlightCount(self._file.path.parent, timeout_seconds=self._timeout_seconds)
            return self._count.refresh()

    def published(self) -> list[SampleRef]:
        return read_unacked(self._file.path.parent, timeout_seconds=self._timeout_seconds)

    def close(self) -> None:
        self._end(frame("C", None) if self._opened else b"")

    def fail(self, reason: str) -> None:
        self._end(frame("F", reason))

    def _end(self, last: bytes) -> None:
        with self._lock:
            if self._ended:
                return
            if last:
                self._append([last])
            self._ended = True
            self._heartbeat.stop()
            self._reader.close()
            if self._count is not None:
                self._count.close()
            self._file.close()

    def _append(self, frames: list[bytes]) -> None:
        opening = [] if self._opened else [frame("O", opened_by(self._file.domain))]
        version = [VERSION_FRAME] if self._new else []
        self._file.append([*version, *opening, *frames], durable=True)
        self._opened, self._new = True, False

    def _refuse_ended(self) -> None:
        if self._ended:
            raise ChannelError("this writer was closed", where=str(self._file.path))
