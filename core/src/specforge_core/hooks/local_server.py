# SPDX-License-Identifier: Apache-2.0
"""A server that a part needs, run for development and tests: what the ``service`` of a descriptor starts.

It runs as a program of its own, in a session of its own, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

_START_SECONDS = 10.0
"""A server on loopback listens within a second; a busy machine takes several."""
_STOP_SECONDS = 5.0
"""Nothing that it holds is worth a longer wait; then it is killed."""
_LOOK_SECONDS = 0.01
"""Servers start within a second; a look costs a read of some lines."""
_TOLD_BYTES = 1000
"""Of its output in an error: the last lines say why it did not start."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a child gets when its parent ends."""


@dataclass(frozen=True)
class LocalServer:
    """A running server. ``log`` is what it prints."""

    port: int
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def said(self) -> bytes:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read()

    def wait_until(self, ready: Callable[[], bool], *, failed: Callable[[str], Exception]) -> None:
        """Wait until it serves.

        :param failed: makes the error, from the end of what it said, where it ended or took too long; it is stopped.
        """
        end = time.monotonic() + _START_SECONDS
        while not ready() or self.process.poll() is not None:
            if self.process.poll() is not None or time.monotonic() > end:
                told = self.said()[-_TOLD_BYTES:].decode(errors="replace").strip()
                self.stop()
                raise failed(told)
            time.sleep(_LOOK_SECONDS)

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


def spawn(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The program's process, and a file that nobody else sees with what it prints."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by LocalServer.stop
    process = subprocess.Popen(
        command,
        cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=dying_with_parent(),
    )
    return process, log


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dying_with_parent() -> Callable[[], None]:
    """What a child does before it becomes another program: ask the kernel (Linux) to kill it when its parent is gone.

    The kernel forgets this for the child's own children. The library is loaded here, in the parent.
    """
    parent = os.getpid()
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:
        return lambda: None

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel was asked
            os._exit(1)

    return prepare
