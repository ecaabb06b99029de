# SPDX-License-Identifier: Apache-2.0
"""Refs and leases of one run on a Redis server that all of its processes reach.

Nothing but the server is shared. Every writer, the reader and every desk has a connection of its own; one more shows
the server which of them live. What must happen at once happens in scripts (``refs.lua``, ``leases.lua``), and what must
be known of time is read from the server's clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from specforge_core.contracts import ChannelError, PartContext, RefChannel, access_proof

from specforge_redis_channel.connection import REFS, RedisConnection
from specforge_redis_channel.heart import Heart
from specforge_redis_channel.lease_desk import RedisLeaseDesk
from specforge_redis_channel.ref_reader import RedisRefReader
from specforge_redis_channel.ref_writer import RedisRefWriter

if TYPE_CHECKING:
    from specforge_redis_channel.config import RedisChannelConfig


class RedisChannel(RefChannel):
    """The run's keys begin with ``specforge:{run id}``."""

    def __init__(self, config: RedisChannelConfig, context: PartContext) -> None:
        self._config = config
        self._base = "specforge:{" + quote(context.run_id, safe="", errors="surrogatepass") + "}"
        self._proof = access_proof(context.token, purpose=self._base) if context.token is not None else ""
        self._heart = Heart(self._connection(), lease_seconds=config.lease_seconds)

    def writer(self, name: str) -> RedisRefWriter:
        """:raises ChannelError: no server, an empty name, or one that a living process writes under."""
        if not name:
            raise ChannelError("a writer needs a name", where=self._base)
        return RedisRefWriter(name, self._connection(), heart=self._heart)

    def reader(self) -> RedisRefReader:
        """:raises ChannelError: no server, or another reader lives."""
        return RedisRefReader(self._connection(), heart=self._heart)

    def leases(self) -> RedisLeaseDesk:
        return RedisLeaseDesk(self._connection(), heart=self._heart)

    def seal(self) -> None:
        connection = self._connection()
        try:
            connection.call(lambda: connection.run(REFS, "seal"))
        finally:
            connection.close()

    def _connection(self) -> RedisConnection:
        return RedisConnection(self._config, base=self._base, proof=self._proof)
