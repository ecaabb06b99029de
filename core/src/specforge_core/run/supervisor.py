# SPDX-License-Identifier: Apache-2.0
"""A run whose halves are separate processes, all on this machine: started, watched and ended by one supervisor.

`specforge run` starts capture processes and one train process of the same run file and owns them: a half that crashes
is started again (what it had taken comes back to the others, and training resumes exactly), a half that ends with an
error ends the run, and nothing is left behind, not even when the supervisor itself is killed. Linux only.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from specforge_core.contracts import SpecForgeError, StopSignal
from specforge_core.contracts.files import make_directory, open_regular
from specforge_core.hooks.local_server import dying_with_parent
from specforge_core.run.interrupt import EXIT_INTERRUPTED

_FIRST_PAUSE_SECONDS = 0.5
"""Before a process is started again; doubled each time, so that one that always fails costs little."""
_LONGEST_PAUSE_SECONDS = 15.0
"""A server that is restarted is back within a minute; who waits longer loses more than a try costs."""
_POLL_SECONDS = 0.05  # how late an end is noticed
_REAP_SECONDS = 10.0  # a killed process is gone at once, unless its disk or device does not answer
_TAIL_LINES = 20  # of a process's log in an error: a traceback's end, or the last words
_TAIL_BYTES = 16_384  # twenty lines of any log fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One process of a run.

    :param restartable: it may be started again with the same command after it was killed.
    :param environment: added to this process's; what others on the machine must not read belongs here.
    """

    name: str
    command: Sequence[str]
    restartable: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


class Phase(Enum):
    """Where a supervised run is."""

    RUNNING = "running"
    FINISHING = "finishing"  # the main half is done, the others may end by themselves
    STOPPING = "stopping"  # the others are told to


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a half's end.

    :param message: what the user is told; "": nothing.
    :param restart_after: seconds until it is started again; None: it is not.
    :param show_log: the half's last words belong to the message.
    """

    message: str = ""
    restart_after: float | None = None
    show_log: bool = False


class SupervisionPolicy:
    """Decides what the end of a half means. No clock, process or file inside.

    ``phase`` says what to do with the halves that still run, ``status`` how the run exits.
    """

    def __init__(self, halves: Sequence[Half], *, main: str, restarts: int) -> None:
        self.phase = Phase.RUNNING
        self.status = 0
        self._main = main
        self._restarts = restarts
        self._restarts_left = {half.name: restarts if half.restartable else 0 for half in halves}

    def ended(self, name: str, status: int) -> Verdict:
        """A half ended.

        :param status: its exit status, or minus the number of the signal that killed it.
        """
        if self.phase is Phase.STOPPING:
            return Verdict()
        how = f"{name} ended with status {status}" if status >= 0 else f"{name} was killed by {_signal_name(-status)}"
        if self.phase is Phase.FINISHING:
            return Verdict(f"{how} after training had finished" if status else "", show_log=status > 0)
        if status == 0:
            if name == self._main:
                self.phase = Phase.FINISHING
            return Verdict()
        if status < 0 and self._restarts_left[name]:
            return self._restart(name, how)
        self._stop(status if status > 0 else 128 - status)
        return Verdict(f"{how}: the run ends", show_log=name != self._main)

    def _restart(self, name: str, how: str) -> Verdict:
        """Pauses double: what kills a half at once (no memory left, say) needs time to pass."""
        self._restarts_left[name] -= 1
        number = self._restarts - self._restarts_left[name]
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** (number - 1), _LONGEST_PAUSE_SECONDS)
        return Verdict(f"{how}: restart {number} of {self._restarts} in {pause:g} s", restart_after=pause)

    def interrupted(self) -> None:
        """The user wants the run to end."""
        if self.phase is not Phase.STOPPING:
            self._stop(EXIT_INTERRUPTED)

    def waited_enough(self) -> None:
        """The time in which the other halves may end by themselves is over."""
        self._stop(self.status)

    def _stop(self, status: int) -> None:
        self.phase = Phase.STOPPING
        self.status = status


def supervise(
    halves: Sequence[Half], *, main: str, logs: Path, stop: StopSignal, restarts: int, grace_seconds: float
) -> int:
    """Run every half to its end. Call from the main thread: the halves die with the thread that started them.

    :param main: the half whose end with status 0 finishes the run; it writes to this process's terminal, every other
        one to the end of ``logs/NAME.log``.
    :param stop: watched; once requested, every half is sent SIGTERM.
    :param restarts: how often each half is started again after it was killed by a signal.
    :param grace_seconds: for ending by oneself once the main half finished, and again between SIGTERM and SIGKILL.
    :returns: exit status of the run: 0; that of the half that failed first, 128 and the signal's number where one
        killed it too often; 130 when stopped.
    :raises SpecForgeError: a half cannot be started; none is left running.
    """
    policy = SupervisionPolicy(halves, main=main, restarts=restarts)
    children = _Children(halves, main=main, logs=logs)
    try:
        for half in halves:
            children.start(half.name)
        _watch(policy, children, stop=stop, grace_seconds=grace_seconds)
    finally:
        children.kill()
    return policy.status


def _watch(policy: SupervisionPolicy, children: _Children, *, stop: StopSignal, grace_seconds: float) -> None:
    """Until every half has ended, or those that would not have been waited for."""
    deadline = math.inf
    while children.remain():
        before = policy.phase
        if stop.reason is not None:
            policy.interrupted()
        for name, status in children.ended():
            _carry_out(policy.ended(name, status), name, children)
        if policy.phase is Phase.FINISHING and time.monotonic() >= deadline:
            policy.waited_enough()
        if policy.phase is not before:
            deadline = time.monotonic() + grace_seconds
            children.due.clear()
            if policy.phase is Phase.STOPPING:
                children.terminate()
        elif policy.phase is Phase.STOPPING and time.monotonic() >= deadline:
            return
        children.start_due()
        # Not stop.wait: a signal handler that requests a stop here would wait for the lock that the wait itself holds.
        time.sleep(_POLL_SECONDS)


def _carry_out(verdict: Verdict, name: str, children: _Children) -> None:
    if verdict.message:
        _say(verdict.message)
    if verdict.show_log:
        children.show_log(name)
    if verdict.restart_after is not None:
        children.start_later(name, verdict.restart_after)


class _Children:
    """The processes of the halves. Each leads a session of its own, so the terminal's Ctrl-C reaches the supervisor
    alone, and whatever a half started can be ended with it."""

    def __init__(self, halves: Sequence[Half], *, main: str, logs: Path) -> None:
        self._halves = {half.name: half for half in sorted(halves, key=lambda half: half.name != main)}
        self._logs = {half.name: logs / f"{half.name}.log" for half in halves if half.name != main}
        self._log_starts: dict[str, int] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.due: dict[str, float] = {}  # when a half is started again

    def remain(self) -> bool:
        """Whether a half runs or is about to be started again."""
        return bool(self._processes or self.due)

    def start(self, name: str) -> None:
        with ExitStack() as opened:
            try:
                log = None
                if (path := self._logs.get(name)) is not None:
                    make_directory(path.parent)
                    log = opened.enter_context(open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab"))
                    self._log_starts[name] = log.tell()
                self._processes[name] = subprocess.Popen(
                    self._halves[name].command,
                    env={**os.environ, **self._halves[name].environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=dying_with_parent(),  # a half sees to it itself that its own children do not outlive it
                )
            except OSError as error:
                raise SpecForgeError(
                    f"cannot be started: {error}",
                    where=f"the run's {name} process",
                    hint="free memory or space, or correct the permissions, then start the same command again",
                ) from error

    def start_later(self, name: str, seconds: float) -> None:
        self.due[name] = time.monotonic() + seconds

    def start_due(self) -> None:
        for name in [name for name, due in self.due.items() if time.monotonic() >= due]:
            del self.due[name]
            self.start(name)

    def ended(self) -> list[tuple[str, int]]:
        """Halves that ended since the last call, the main one first, and how; each is reaped."""
        running = [name for name in self._halves if name in self._processes]
        return [(name, self._reap(name)) for name in running if self._has_ended(name)]

    def _has_ended(self, name: str) -> bool:
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._processes[name].pid, how) is not None

    def _reap(self, name: str) -> int:
        """Whatever the half started ends with it: while it is not reaped, its number names its own group only."""
        process = self._processes.pop(name)
        _kill_group(process)
        return process.wait()

    def terminate(self) -> None:
        """Ask each half to end; it is its affair to end what it started."""
        for process in self._processes.values():
            process.terminate()

    def kill(self) -> None:
        """End at once what still runs, and wait until it has."""
        for name, process in self._processes.items():
            _say(f"{name} still runs and is killed")
            _kill_group(process)
        deadline = time.monotonic() + _REAP_SECONDS
        for name, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"{name} (process {process.pid}) hangs in the kernel and outlives the run")
        self._processes.clear()

    def show_log(self, name: str) -> None:
        """The last lines that the half's last process wrote."""
        with open(open_regular(self._logs[name], os.O_RDONLY), "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_starts[name], size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        _say("\n".join([f"{self._logs[name]} ends with:", *(f"  {line}" for line in lines)]))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _signal_name(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
