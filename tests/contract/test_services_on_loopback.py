# SPDX-License-Identifier: Apache-2.0
"""Development servers are for one machine: no port of theirs, whichever process opens it, answers elsewhere."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import psutil
import pytest
from mooncake_service import require_mooncake
from redis_service import require_redis

DEADLINE = 60
PRINTED_LINES = {"redis": 4, "mooncake": 5}


@contextmanager
def serving(name: str) -> Iterator[tuple[psutil.Process, list[str]]]:
    """The command's process, and what it printed when it was ready."""
    command = [sys.executable, "-m", "specforge_core.cli.main", "services", name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process = psutil.Process(child.pid)
    try:
        assert child.stdout is not None
        yield process, [child.stdout.readline() for _ in range(PRINTED_LINES[name])]
    finally:
        child.kill()
        child.wait(DEADLINE)


def is_loopback(address: str) -> bool:
    found = ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return (mapped or found).is_loopback


def listening(process: psutil.Process) -> list[str]:
    """Addresses at which it, or a process that it started, waits for others (TCP), or may be sent something (UDP)."""
    family = [process, *process.children(recursive=True)]
    found = [connection for member in family for connection in member.net_connections("inet")]
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN or (c.status == psutil.CONN_NONE and c.laddr)]


@pytest.mark.parametrize("name", ["redis", "mooncake"])
def test_a_server_listens_on_loopback_only_and_leaves_nothing_behind(name: str) -> None:
    {"redis": require_redis, "mooncake": require_mooncake}[name]()
    with serving(name) as (process, _):
        addresses = listening(process)
        assert len(addresses) >= {"redis": 1, "mooncake": 4}[name]
        assert [address for address in addresses if not is_loopback(address)] == []
        children = process.children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        assert psutil.wait_procs(children, DEADLINE)[1] == []


def test_memory_on_loopback_can_be_used(tmp_path: Path) -> None:
    require_mooncake()
    from specforge_core.contracts import PartContext
    from specforge_core.testing.samples import assert_same, make_sample
    from specforge_mooncake_store.config import MooncakeStoreConfig
    from specforge_mooncake_store.store import MooncakeStore

    with serving("mooncake") as (_, printed):
        master = printed[3].split("master: ")[1].strip()
        section = MooncakeStoreConfig(name="mooncake", master=master, segment_bytes=0)
        store = MooncakeStore(section, PartContext(run_id="loopback", directory=tmp_path))
        assert_same(store.get(store.put(make_sample().sample_id, make_sample())), make_sample())
        store.close()


def test_killing_it_ends_what_it_started() -> None:
    require_mooncake()
    with serving("mooncake") as (process, _):
        children = process.children(recursive=True)
        assert len(children) == 2
        process.kill()
        assert psutil.wait_procs(children, DEADLINE)[1] == []
