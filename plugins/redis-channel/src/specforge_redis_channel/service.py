# SPDX-License-Identifier: Apache-2.0
"""A local server for development and tests: what ``specforge services redis`` runs until Ctrl-C.

It listens on loopback only, keeps nothing on disk, and dies with the process that started it.
"""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from specforge_core.contracts import ChannelError

_START_SECONDS = 10.0
_STOP_SECONDS = 5.0
_WHERE = "service redis"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        """End it, whatever state it is in. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


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
    port = port or _free_port()
    kept = ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), *kept, *options]
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by Server.stop
    process = subprocess.Popen(
        command,
        cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_dying_with_us(),
    )
    server = Server(port, process, log)
    end = time.monotonic() + _START_SECONDS
    while not _ready(server):
        if process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            told = log.read()[-600:].decode(errors="replace").strip()
            server.stop()
            raise ChannelError(f"redis-server does not start: {told}", where=_WHERE, hint=f"is port {port} free?")
        time.sleep(0.01)
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


def _ready(server: Server) -> bool:
    """Whether it says that it listens: a port that answers could be somebody else's."""
    server.log.seek(0)
    told = server.log.read()
    return b"eady to accept connections" in told and server.process.poll() is None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _dying_with_us() -> Callable[[], None]:
    """What the server does before it begins: ask the kernel (Linux) to be ended when the process that started it is."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:
        return lambda: None
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
