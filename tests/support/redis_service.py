# SPDX-License-Identifier: Apache-2.0
"""A real Redis server for tests: killable, stoppable, started again at its address, with or without its files."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_runs = itertools.count()


def require_redis() -> None:
    """Fail where the server is not installed: a set-up step that is missing must not look like success."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server is not installed: `make services` installs what the tests need")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisService:
    """A server in ``directory``. With ``appendonly``, each write is on disk before it is answered."""

    def __init__(self, directory: Path, *, password: str = "", appendonly: bool = False, tls: bool = False) -> None:
        from specforge_redis_channel.service import start_server

        directory.mkdir(parents=True, exist_ok=True)
        self._start = start_server
        self._password = password
        self.certificate = directory / "server.pem"
        self.socket = directory / "redis.sock"
        self._options = ["--dir", str(directory), "--unixsocket", str(self.socket)]
        if password:
            self._options += ["--requirepass", password]
        if appendonly:
            self._options += ["--appendonly", "yes", "--appendfsync", "always"]
        if tls:
            self._tls_port = free_port()
            make_certificate(directory)
            key, certificate = str(directory / "server.key"), str(self.certificate)
            self._options += ["--tls-port", str(self._tls_port), "--tls-cert-file", certificate, "--tls-key-file", key]
            self._options += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
        self._server = self._start(options=self._options)
        self.port = self._server.port

    @property
    def pid(self) -> int:
        return self._server.process.pid

    @property
    def url(self) -> str:
        login = f":{self._password}@" if self._password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    @property
    def tls_url(self) -> str:
        return f"rediss://127.0.0.1:{self._tls_port}/0"

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._server.stop()

    def restart(self) -> None:
        """Again at the same address: empty, or with what its append-only file kept."""
        self._server = self._start(self.port, options=self._options)

    def stand_still(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        self._server.stop()

    def section(self, **settings: Any) -> Any:
        """A channel's section, with deadlines that fit tests."""
        from specforge_redis_channel.config import RedisChannelConfig

        given = {"url": self.url, "lease_seconds": 1.0, "reconnect_seconds": 10.0}
        return RedisChannelConfig.model_validate({"name": "redis", **given, **settings})

    def channel(self, run_id: str, *, token: str | None = None, **settings: Any) -> Any:
        from specforge_core.contracts import PartContext
        from specforge_redis_channel.channel import RedisChannel

        return RedisChannel(self.section(**settings), PartContext(run_id=run_id, directory=Path(), token=token))

    def client(self) -> Any:
        """The library's own client."""
        import redis

        return redis.Redis.from_url(self.url, socket_timeout=10)


@contextmanager
def redis_service(directory: Path, **settings: Any) -> Iterator[RedisService]:
    """A server for the block. It dies with this process whatever happens."""
    require_redis()
    service = RedisService(directory, **settings)
    try:
        yield service
    finally:
        service.stop()


def make_certificate(directory: Path) -> None:
    """A key and a self-signed certificate for 127.0.0.1."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(directory / "server.key"), "-out", str(directory / "server.pem"), "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def fresh_run() -> str:
    """A run id that no other test uses."""
    return f"test-{os.getpid()}-{next(_runs)}"


def wait_until(happens: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
