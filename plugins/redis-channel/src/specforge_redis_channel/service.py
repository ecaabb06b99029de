# SPDX-License-Identifier: Apache-2.0
"""A local server for development and tests: what ``specforge services redis`` runs until Ctrl-C.

It listens on loopback only, keeps nothing on disk, and dies with the process that started it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from specforge_core import LocalServer, free_port, spawn
from specforge_core.contracts import ChannelError

_WHERE = "service redis"


class Server(LocalServer):
    """A running server."""

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def start_server(port: int | None = None, *, options: Sequence[str] = ()) -> Server:
    """Start a server on loopback and wait until it listens.

    :param port: where; None: a free one.
    :param options: more of its command line, such as ``--requirepass secret``.
    :raises ChannelError: it is not installed, or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise ChannelError(
            "redis-server is not installed", where=_WHERE, hint="apt-get install redis-server, or brew install redis"
        )
    port = port or free_port()
    kept = ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
    server = Server(port, *spawn([program, "--bind", "127.0.0.1", "--port", str(port), *kept, *options]))
    server.wait_until(
        lambda: b"eady to accept connections" in server.said(),  # a port that answers could be somebody else's
        failed=lambda told: ChannelError(
            f"redis-server does not start: {told}", where=_WHERE, hint=f"is port {port} free?"
        ),
    )
    return server


def serve(port: int | None) -> None:
    """Run a server until it ends or Ctrl-C.

    :raises ChannelError: it cannot be started, or ended by itself.
    """
    server = start_server(port)
    try:
        print(
            "# a redis server that keeps nothing when it ends, until Ctrl-C; in the run file:\n"
            f"channel:\n  name: redis\n  url: {server.url}",
            flush=True,
        )
        try:
            server.process.wait()
        except KeyboardInterrupt:
            return
        raise ChannelError(f"redis-server ended with status {server.process.returncode}", where=_WHERE)
    finally:
        server.stop()
