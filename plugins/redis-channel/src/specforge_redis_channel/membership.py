# SPDX-License-Identifier: Apache-2.0
"""Taking a place that one process at a time may have: a writer's name, or the reader's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from specforge_core.contracts import ChannelError

from specforge_redis_channel.connection import RedisConnection

_PAUSE_SECONDS = 0.05


def take_place(connection: RedisConnection, ask: Callable[[], list[Any]], *, what: str) -> list[Any]:
    """Ask until the place is given. Waits for the heartbeat of a process that died to end, for one that lives not.

    :param ask: inside an operation of the connection; ``busy`` and when the heartbeat ends, or ``ok`` and more.
    :returns: what came with ``ok``.
    :raises ChannelError: a process that lives has it.
    """
    first: bytes | None = None
    while True:
        status, *found = connection.call(ask)
        if status == b"ok":
            return found
        first = first or found[0]
        if found[0] != first:
            raise ChannelError(
                f"{what}, which lives",
                where=connection.where,
                hint="stop that process first, or give this run a run.id of its own",
            )
        time.sleep(_PAUSE_SECONDS)
