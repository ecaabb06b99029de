# SPDX-License-Identifier: Apache-2.0
"""A local master for development and tests: what ``specforge services mooncake`` runs until Ctrl-C.

The master is a program of its own that the vendor's package brings. It dies with the process that started it, listens
on loopback, and without more has no memory: ``serve`` brings some, so that features outlive the capture processes. The
process that brings it (``memory_holder``) is kept on loopback too.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from specforge_core import LocalServer, dying_with_parent, free_port, spawn
from specforge_core.contracts import StoreError

from specforge_mooncake_store.memory_holder import MemoryHolder

_POLL_SECONDS = 0.2
_MOST_MEMORY = 4 << 30
"""Enough for a development run; never more than a quarter of the machine's."""
_WHERE = "service mooncake"


@dataclass(frozen=True, kw_only=True)
class Master(LocalServer):
    """A running master. ``address`` is what ``store.master`` says; ``metrics`` answers HTTP."""

    metrics: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def start_master(port: int | None = None, *, options: Sequence[str] = ()) -> Master:
    """Start a master on loopback and wait until it answers.

    :param port: where; None: a free one.
    :param options: more of its command line, such as ``--client_ttl=3``.
    :raises StoreError: it is not installed, or does not start.
    """
    port, metrics = port or free_port(), free_port()
    command = [
        str(_program()),
        "--rpc_address=127.0.0.1",
        f"--rpc_port={port}",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={metrics}",
        "--rpc_thread_num=2",
        "--logtostderr=true",
        *options,
    ]
    master = Master(port, *spawn(command), metrics=f"127.0.0.1:{metrics}")
    master.wait_until(
        lambda: _answers(port),
        failed=lambda told: StoreError(
            f"the master does not start: {told}", where=_WHERE, hint=f"is port {port} free?"
        ),
    )
    return master


def serve(port: int | None) -> None:
    """Run a master, and memory for it, until it ends or Ctrl-C.

    :raises StoreError: it cannot be started, or ended by itself.
    """
    memory = min(_MOST_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    with ExitStack() as started:
        master = start_master(port)
        started.callback(master.stop)
        holder = MemoryHolder(master.address, memory, prepare=dying_with_parent())
        started.callback(holder.stop)
        print(
            f"# a mooncake master with {memory / 2**30:.1f} GiB of memory, until Ctrl-C; in the run file:\n"
            f"store:\n  name: mooncake\n  master: {master.address}\n  segment_bytes: 0   # the memory is here",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            while master.process.poll() is None and holder.process.poll() is None:
                time.sleep(_POLL_SECONDS)
            ended = f"the master {master.process.poll()}, its memory {holder.process.poll()}"
            raise StoreError(f"it ended by itself (status of {ended})", where=_WHERE)


def _program() -> Path:
    """The master's program itself: the package's console script may start it as a child that outlives the script."""
    found = importlib.util.find_spec("mooncake")
    places = (found.submodule_search_locations or []) if found is not None else []
    programs = [Path(place) / "mooncake_master" for place in places]
    program = next((path for path in programs if path.exists()), None)
    if program is None:
        raise StoreError(
            "mooncake is not installed", where=_WHERE, hint="pip install 'specforge-mooncake-store[cpu]', or [cuda]"
        )
    if not os.access(program, os.X_OK):
        try:
            program.chmod(program.stat().st_mode | 0o111)  # some wheels were packed without
        except OSError as error:
            raise StoreError(f"{program} is not executable: {error.strerror}", where=_WHERE) from error
    return program


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except OSError:
        return False
    return True
