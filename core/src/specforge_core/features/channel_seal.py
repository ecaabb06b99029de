# SPDX-License-Identifier: Apache-2.0
"""Closes what dead writers of a file channel left open, once nothing more is to be published."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from specforge_core.contracts import ChannelError
from specforge_core.features.channel_tails import VERSION_FRAME, WriterTail
from specforge_core.features.record_file import RecordAppender, frame

_PAUSE_SECONDS = 0.05


def close_abandoned(paths: Sequence[Path], *, timeout_seconds: float) -> None:
    """Close every file that is not closed and whose writer does not live.

    :raises ChannelError: a file cannot be written.
    """
    tails = [WriterTail(path, timeout_seconds=timeout_seconds) for path in paths]
    try:
        for tail in _unfinished(tails, timeout_seconds):
            try:
                _close(tail)
            except OSError as error:
                raise ChannelError(f"cannot be closed: {error.strerror}", where=str(tail.path)) from error
    finally:
        for tail in tails:
            tail.close()


def _unfinished(tails: Sequence[WriterTail], timeout_seconds: float) -> list[WriterTail]:
    """Those that ended without closing. Waits for the heartbeat of those whose lock would not be seen."""
    undecided = [tail for tail in tails if not tail.ends_closed() and not tail.process.is_locked()]
    beats = {tail.path: tail.process.heartbeat_ns() for tail in undecided}
    ended: list[WriterTail] = []
    deadline = time.monotonic() + 2 * timeout_seconds
    while undecided and time.monotonic() < deadline:
        for tail in undecided:
            while tail.read():
                pass
        ended += [tail for tail in undecided if tail.state == "failed" or tail.is_dead()]
        silent = [tail for tail in undecided if tail.process.heartbeat_ns() == beats[tail.path]]
        undecided = [tail for tail in silent if tail not in ended]
        if undecided:
            time.sleep(_PAUSE_SECONDS)
    return ended


def _close(tail: WriterTail) -> None:
    """Does nothing where another process closes or continues it at this moment."""
    try:
        file = RecordAppender(tail.path)
    except ChannelError:
        return
    try:
        if not tail.ends_closed():
            version = [] if tail.process.size() else [VERSION_FRAME]
            file.append([*version, frame("C", None)], durable=True)
    finally:
        file.close()
