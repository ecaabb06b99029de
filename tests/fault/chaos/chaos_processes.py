# SPDX-License-Identifier: Apache-2.0
"""Processes for the fault harness: `specforge` commands that start in a blink, die with the harness and leave a log.

They are forked from a server that has imported everything, so that starting one again costs a model load and no more.
Each has a wall clock of its own that can be set while it runs; its monotonic clock goes on, as a machine's does.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

TAIL_BYTES = 3000
_PR_SET_PDEATHSIG = 1
_PRELOAD = [
    "specforge_core.cli.app",
    "specforge_core.run.roles",
    "specforge_hf_target.engine",
    "specforge_eagle3.strategy",
    "transformers.models.qwen3.modeling_qwen3",
]


def die_with_parent() -> None:
    """The kernel kills this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _set_clock_by(path: Path) -> None:
    """Wall clocks of this process run ahead by what the file says, in seconds, whenever it is asked."""
    real, real_ns = time.time, time.time_ns

    def ahead() -> float:
        try:
            return float(path.read_text())
        except (OSError, ValueError):
            return 0.0

    time.time = lambda: real() + ahead()
    time.time_ns = lambda: real_ns() + int(ahead() * 1e9)


def _become(arguments: Sequence[str], directory: str, log: str, clock: str) -> None:
    """What a forked process does: `specforge ARGUMENTS`."""
    die_with_parent()
    os.setsid()
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # multiprocessing opened the null device for these, whose buffering hides the last words
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200", TOKENIZERS_PARALLELISM="false")
    _set_clock_by(Path(clock))
    from specforge_core.cli.main import main

    main(arguments)


class Child:
    """One `specforge` command, started again and again under one name."""

    def __init__(self, name: str, arguments: Sequence[str], *, directory: Path) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.clock = directory / f"{name}.clock"
        self.starts = 0
        self.killed = False
        self._arguments = list(arguments)
        self._directory = directory
        self._log_start = 0
        self._process: BaseProcess | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def started(self) -> bool:
        """It was started and its end was not looked at yet."""
        return self._process is not None

    def start(self) -> None:
        assert self._process is None
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.killed = False
        self.starts += 1
        arguments = (self._arguments, str(self._directory), str(self.log), str(self.clock))
        self._process = _context().Process(target=_become, args=arguments, name=self.name, daemon=True)
        self._process.start()

    def kill(self) -> bool:
        """SIGKILL; whether there was anything to kill."""
        if not self.running:
            return False
        self.killed = True
        self.send(signal.SIGKILL)
        return True

    def send(self, number: int) -> None:
        if self.running and self._process is not None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def wait(self, seconds: float) -> None:
        if self._process is not None:
            self._process.join(seconds)

    def take_status(self) -> int | None:
        """How it ended, once; None while it runs."""
        if self._process is None or self._process.is_alive():
            return None
        status = self._process.exitcode
        self._process = None
        return status

    def said(self) -> str:
        """What the last process wrote, at most its end."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - TAIL_BYTES))
            return file.read().decode(errors="replace")


def processes_of(directory: Path) -> list[str]:
    """Processes but this one that work in ``directory`` or name it."""
    found, name = [], str(directory).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            where = os.readlink(entry / "cwd").encode()
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if where.startswith(name) or name in command or name in environment:
            found.append(f"{entry.name}: {command.replace(bytes(1), b' ').decode(errors='replace').strip()}")
    return found
