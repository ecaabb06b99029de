# SPDX-License-Identifier: Apache-2.0
"""A real Mooncake master for tests, and stores and bare clients of it."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

_MASTER_OPTIONS = ("--default_kv_lease_ttl=2000", "--client_ttl=3")
_runs = itertools.count()


def require_mooncake() -> None:
    """Fail where the library cannot be loaded: a set-up step that is missing must not look like success."""
    try:
        import mooncake.store  # noqa: F401
    except ImportError as error:
        pytest.fail(f"mooncake cannot be imported: {error}; `make services` installs its system libraries")


class MooncakeService:
    """A master that can be killed, stopped and started again at its address."""

    def __init__(self) -> None:
        from specforge_mooncake_store.service import start_master

        self._start = start_master
        self._master = start_master(options=_MASTER_OPTIONS)
        self.address = self._master.address

    @property
    def pid(self) -> int:
        return self._master.process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._master.stop()

    def restart(self) -> None:
        """A new, empty master where the old one was."""
        self._master = self._start(int(self.address.rpartition(":")[2]), options=_MASTER_OPTIONS)

    def stop(self) -> None:
        self._master.stop()

    def keys(self, containing: str = "") -> list[str]:
        """Every object there is, whoever put it."""
        with urlopen(f"http://{self._master.metrics}/get_all_keys", timeout=10) as answer:
            return sorted(key for key in answer.read().decode().split() if containing in key)

    def section(self, **settings: Any) -> Any:
        """A store's section: a small segment, and deadlines that fit tests."""
        from specforge_mooncake_store.config import MooncakeStoreConfig

        given = {"master": self.address, "host": "127.0.0.1", "segment_bytes": 64 << 20, "deadline_seconds": 10.0}
        return MooncakeStoreConfig.model_validate({"name": "mooncake", **given, **settings})

    def store(self, run_id: str, *, token: str | None = None, **settings: Any) -> Any:
        from specforge_core.contracts import PartContext
        from specforge_mooncake_store.store import MooncakeStore

        return MooncakeStore(self.section(**settings), PartContext(run_id=run_id, directory=Path(), token=token))


@contextmanager
def mooncake_service() -> Iterator[MooncakeService]:
    """A master for the block. It dies with this process whatever happens."""
    service = MooncakeService()
    try:
        yield service
    finally:
        service.stop()


def fresh_run() -> str:
    """A namespace that no other test uses."""
    return f"test-{os.getpid()}-{next(_runs)}"


@contextmanager
def bare_client(service: MooncakeService) -> Iterator[Any]:
    """The library's own client, which brings no memory."""
    from mooncake.store import MooncakeDistributedStore
    from specforge_mooncake_store.vendor_environment import limit_waits

    limit_waits("127.0.0.1")
    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", service.address) == 0
    try:
        yield client
    finally:
        client.close()


def wait_until(happens: Any, seconds: float = 20.0) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
