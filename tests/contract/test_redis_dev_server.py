# SPDX-License-Identifier: Apache-2.0
"""``specforge services redis``: a local server that prints its URL, and leaves nothing behind however it is ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis_service import free_port, fresh_run, require_redis, wait_until
from specforge_core.contracts import PartContext

DEADLINE = 30
COMMAND = [sys.executable, "-m", "specforge_core.cli.main", "services", "redis"]


@pytest.fixture(autouse=True)
def _with_redis() -> None:
    require_redis()


@contextmanager
def dev_server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command's process, and the URL that it printed."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        yield process, lines[3].split("url: ")[1].strip()
    finally:
        process.kill()
        process.wait(DEADLINE)


def answers(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0]))) == 0


def test_what_it_prints_can_be_used_and_ctrl_c_ends_it() -> None:
    from specforge_redis_channel.channel import RedisChannel
    from specforge_redis_channel.config import RedisChannelConfig

    port = free_port()
    with dev_server("--port", str(port)) as (process, url):
        assert f":{port}/" in url
        channel = RedisChannel(
            RedisChannelConfig(name="redis", url=url), PartContext(run_id=fresh_run(), directory=Path())
        )
        channel.reader().close()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        assert not answers(url)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_it_dies_with_the_process_that_started_it() -> None:
    with dev_server() as (process, url):
        assert answers(url)
        process.kill()
        wait_until(lambda: not answers(url))


def test_a_port_that_is_taken_and_a_missing_server_are_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 2
        assert f"is port {port} free?" in done.stderr.replace("\n", " ")
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=DEADLINE, check=False, env=environment)
    assert done.returncode == 2
    assert "redis-server is not installed" in done.stderr
    assert "Traceback" not in done.stderr
