# SPDX-License-Identifier: Apache-2.0
"""The ref channel contract on a real Redis server, and what is special to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_service import RedisService, redis_service
from specforge_core.contracts import RefChannel, RefReader, RefWriter
from specforge_core.testing.ref_channel_suite import RefChannelSuite


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    with redis_service(tmp_path_factory.mktemp("redis")) as running:
        yield running


def vanish(side: RefReader | RefWriter) -> None:
    """End as the death of its process would: no heartbeat any more, not a word."""
    side._heart.leave(side._member)
    side._connection.close()
    setattr(side, "_ended" if isinstance(side, RefWriter) else "_closed", True)


class TestRedisChannel(RefChannelSuite):
    replayable = True
    cross_process = True

    @pytest.fixture(autouse=True)
    def _with_server(self, service: RedisService) -> None:
        self.service = service

    def make_channel(self, directory: Path) -> RefChannel:
        return self.service.channel(f"run {directory}")

    def kill_writer(self, channel: RefChannel, writer: RefWriter) -> None:
        vanish(writer)

    def kill_reader(self, channel: RefChannel, reader: RefReader) -> None:
        vanish(reader)
