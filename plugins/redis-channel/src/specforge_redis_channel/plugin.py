# SPDX-License-Identifier: Apache-2.0
"""What this distribution offers to SpecForge: the ``redis`` ref channel. Imports neither torch nor redis."""

from __future__ import annotations

from specforge_core import RefChannelSpec, hookimpl
from specforge_core.contracts import ChannelCapabilities

from specforge_redis_channel.config import RedisChannelConfig


@hookimpl
def specforge_ref_channels() -> list[RefChannelSpec]:
    return [
        RefChannelSpec(
            name="redis",
            config=RedisChannelConfig,
            factory="specforge_redis_channel.channel:RedisChannel",
            # Not durable: whether anything outlives the server is decided by how the server is set up.
            capabilities=ChannelCapabilities(cross_process=True, cross_host=True, replayable=True),
            summary="refs over Redis Streams, between any number of machines",
            example=None,
            service="specforge_redis_channel.service:serve",
        )
    ]
