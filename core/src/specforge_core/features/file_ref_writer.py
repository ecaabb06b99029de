# SPDX-License-Identifier: Apache-2.0
"""The capture side of a file channel: appends refs to one file and follows what the reader says of them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from specforge_core.contracts import ChannelError, InFlight, RefWriter, SampleRef
from specforge_core.features.channel_tails import VERSION_FRAME, Outstanding, WriterTail
from specforge_core.features.record_file import RecordAppender, frame
from specforge_core.features.ref_codec import RefEncoder

_BEATS_PER_TIMEOUT = 4


class FileRefWriter(RefWriter):
    """Appends refs to one file. Thread-safe.

    A thread touches the file now and then, so that readers on machines that do not see its lock know that it lives.
    """

    def __init__(self, path: Path, *, timeout_seconds: float) -> None:
        self._lock = threading.RLock()
        self._file = RecordAppender(path)
        self._opened = False
        self._ended = False
        self._stop = threading.Event()
        try:
            self._continue()
            self._outstanding = Outstanding(path.parent)
        except ChannelError:
            self._file.close()
            raise
        beats = (weakref.ref(self._file), self._stop, timeout_seconds / _BEATS_PER_TIMEOUT)
        threading.Thread(target=_beat, args=beats, daemon=True).start()
        weakref.finalize(self, self._stop.set)

    def _continue(self) -> None:
        """Go on after what an earlier writer of this name left."""
        before = WriterTail(self._file.path)
        try:
            before.read()
            self._new = self._file.path.stat().st_size == 0
            self._encoder = RefEncoder(before.layouts)
        finally:
            before.close()
        # A closed file stays closed until there is something to add: opening it again must not unseal the channel.
        if not before.closed:
            self._append([])

    def publish(self, refs: Sequence[SampleRef]) -> None:
        with self._lock:
            self._follow_reader()
            encoder = self._encoder.copy()
            frames: list[bytes] = []
            for ref in refs:
                try:
                    layout, record = encoder.encode(ref)
                except ValueError as error:
                    raise ChannelError(str(error), where=str(self._file.path)) from error
                if layout is not None:
                    frames.append(frame("L", layout))
                frames.append(frame("R", record))
            if frames:
                self._append(frames)
                self._encoder = encoder

    def in_flight(self) -> InFlight:
        with self._lock:
            self._follow_reader()
            return self._outstanding.in_flight

    def published(self) -> list[SampleRef]:
        with self._lock:
            tail = WriterTail(self._file.path)
            try:
                return [tail.decode(record) for record in tail.read()]
            finally:
                tail.close()

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
            self._stop.set()
            self._outstanding.close()
            self._file.close()

    def _append(self, frames: list[bytes]) -> None:
        opening = [] if self._opened else [frame("O", [os.uname().nodename, os.getpid()])]
        version = [VERSION_FRAME] if self._new else []
        self._file.append([*version, *opening, *frames], durable=True)
        self._opened, self._new = True, False

    def _follow_reader(self) -> None:
        if self._ended:
            raise ChannelError("this writer was closed", where=str(self._file.path))
        self._outstanding.refresh()
        self._outstanding.raise_if_failed()


def _beat(held: weakref.ref[RecordAppender], stop: threading.Event, seconds: float) -> None:
    """Beat until the writer ends; a writer that is dropped without ending must not be kept alive, nor its lock."""
    while not stop.wait(seconds):
        file = held()
        with suppress(OSError, ValueError):  # it was closed meanwhile
            if file is not None:
                file.beat()
        del file
