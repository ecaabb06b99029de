# SPDX-License-Identifier: Apache-2.0
"""Closes what dead writers of a file channel left open, once nothing more is to be published."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from specforge_core.contracts import ChannelError
from specforge_core.features.channel_tails import VERSION_FRAME, WriterTail
from specforge_core.features.record_file import RecordAppender, frame

_PAUSE_SECONDS = 0.05
_BEGIN_SECONDS = 5.0
"""A process that made its file says a few system calls later who it is. One that did not within seconds, and holds no
lock, could not go on: its disk was full, or it was killed."""
_MOST_NAMED = 3

_log = logging.getLogger(__name__)


def close_abandoned(paths: Sequence[Path], *, timeout_seconds: float) -> None:
    """Close every file that is not closed and whose writer does not live.

    :raises ChannelError: a file cannot be written.
    """
    for path in _abandoned(paths, timeout_seconds):
        try:
            _close(path)
        except OSError as error:
            raise ChannelError(f"cannot be closed: {error.strerror}", where=str(path)) from error


def _abandoned(paths: Sequence[Path], timeout_seconds: float) -> list[Path]:
    """Those that ended without closing. Waits for the heartbeat of those whose lock would not be seen."""
    undecided = [_Candidate(path, timeout_seconds) for path in paths]
    abandoned: list[Path] = []
    begin = time.monotonic()
    told = False
    while undecided:
        seconds = time.monotonic() - begin
        found = {candidate: candidate.look(seconds) for candidate in undecided}
        abandoned += [candidate.path for candidate in undecided if found[candidate] == "ended"]
        undecided = [candidate for candidate in undecided if found[candidate] == "unknown"]
        if seconds > 2 * timeout_seconds or not undecided:
            break
        if not told:
            _say([candidate.path.stem for candidate in undecided])
            told = True
        time.sleep(_PAUSE_SECONDS)
    return abandoned


def _say(names: Sequence[str]) -> None:
    shown = ", ".join(map(ascii, names[:_MOST_NAMED]))  # whoever can write there chose them
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    _log.warning("waiting for a sign of life of writer %s%s, perhaps on another machine", shown, more)


class _Candidate:
    """One file, looked at again and again; it is open only while it is."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self.path = path
        self._tail = WriterTail(path, timeout_seconds=timeout_seconds)
        self._heartbeat_ns = self._tail.process.heartbeat_ns()
        self._tail.close()

    def look(self, seconds: float) -> Literal["ended", "lives or closed", "unknown"]:
        """:param seconds: since it was first looked at."""
        try:
            process = self._tail.process
            if process.is_locked() or self._tail.ends_closed() or process.heartbeat_ns() != self._heartbeat_ns:
                return "lives or closed"
            while self._tail.read():
                pass
            never_began = seconds > _BEGIN_SECONDS and not self._tail.begun
            return "ended" if self._tail.state == "failed" or self._tail.is_dead() or never_began else "unknown"
        finally:
            self._tail.close()


def _close(path: Path) -> None:
    """Does nothing where another process closes or continues it at this moment."""
    try:
        file = RecordAppender(path)
    except ChannelError:
        return
    try:
        if file.last_kind != "C":
            file.append([*([] if file.size else [VERSION_FRAME]), frame("C", None)], durable=True)
    finally:
        file.close()
