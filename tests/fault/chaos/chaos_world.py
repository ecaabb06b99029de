# SPDX-License-Identifier: Apache-2.0
"""One disaggregated run under supervision of the fault harness: started, watched, started again, judged at its end."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from chaos_oracle import EPOCHS, SEED, WINDOW, Result, problems_of, prompt_ids
from chaos_processes import Child
from command_line import make_run_file
from tiny_model import TinyModel

CHECKPOINT_STEPS = 4
EXPLAINED_SECONDS = 90.0  # a process that ends with an error so long after a fault may have ended because of it
_TICK_SECONDS = 0.01
_END_SECONDS = 75.0  # a capture that came after the end believes it only after the deadline for samples
_RESTART_SECONDS = 0.3


class ChaosFailure(AssertionError):
    """The run did something that it must not, whatever was done to it."""


class WorldWires(Protocol):
    """What joins the halves of a world, and what of it must be gone at the end."""

    sections: dict[str, dict[str, object]]

    def leftovers(self, run: Path) -> list[str]: ...

    def close(self) -> None: ...


@dataclass
class Injected:
    """A fault that was injected. ``explains``: what processes may say that ends them with status 2 after it."""

    kind: str
    detail: str
    at: float
    step: int
    explains: Sequence[str] = ()
    recovered_seconds: float | None = None


@dataclass
class Counts:
    restarts_after_kill: int = 0
    restarts_after_error: int = 0
    errors: list[str] = field(default_factory=list)


class World:
    """One run, its processes, and what was done to it."""

    def __init__(self, directory: Path, model: TinyModel, *, wires: WorldWires, captures: int, retain: str) -> None:
        self.directory = directory
        self.wires = wires
        self.run = directory / "run"
        self.faults: list[Injected] = []
        self.counts = Counts()
        self.began = time.monotonic()
        self.finished = False
        self._due: dict[str, float] = {}
        token = directory / "token"
        token.write_text("a secret of this run alone\n")
        token.chmod(0o600)
        self.run_file = make_run_file(
            model,
            directory / "run.yaml",
            topology="disaggregated",
            run={"id": f"chaos-{directory.name}", "token_file": str(token)},
            training={"global_batch_size": WINDOW, "epochs": EPOCHS},
            capture={"batch_size": 6},
            checkpoint={"every_steps": CHECKPOINT_STEPS},
            evaluation={"every_steps": 30},
            loading={"deadline_seconds": 60.0, "retain": retain},
            **wires.sections,
        )
        assert SEED == 3  # make_run_file's
        self.train = Child("train", ["train", str(self.run_file)], directory=directory)
        self.captures = [
            Child(f"capture-{number}", ["capture", str(self.run_file)], directory=directory)
            for number in range(captures)
        ]

    @property
    def children(self) -> list[Child]:
        return [self.train, *self.captures]

    @property
    def steps(self) -> int:
        """Optimizer steps on record; falls when training resumes from a checkpoint."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def start(self) -> None:
        for child in self.children:
            child.start()

    def pass_time(self, seconds: float) -> None:
        """Supervise for so long."""
        until = time.monotonic() + seconds
        while True:
            self.tick()
            if (left := until - time.monotonic()) <= 0:
                return
            time.sleep(min(_TICK_SECONDS, left))

    def wait_for(self, happens: Callable[[], bool], *, seconds: float, pause: float = 0.002) -> bool:
        """Supervise until something happens, or training has finished; False where it did not in time."""
        until = time.monotonic() + seconds
        while not happens() and not self.finished:
            if time.monotonic() > until:
                return False
            self.tick()
            time.sleep(pause)
        return True

    def tick(self) -> None:
        """Do what a supervisor does: look who ended and why, start again."""
        for child in self.children:
            if child.name in self._due and time.monotonic() > self._due[child.name] and not self.finished:
                del self._due[child.name]
                child.start()
            elif child.started and (status := child.take_status()) is not None:
                self._ended(child, status)

    def _ended(self, child: Child, status: int) -> None:
        if status == 0 and child is self.train:
            self.finished = True
        elif status == 0 and not self._training_is_over():
            raise ChaosFailure(f"{child.name} ended with status 0 before training did")
        elif status == -9 and child.killed:
            self.counts.restarts_after_kill += 1
            self._restart(child)
        elif status == 2 and (why := self._explained(child.said())):
            self.counts.restarts_after_error += 1
            why = re.sub(r"[\w.-]*[0-9a-f]{6,}[\w.-]*|127\.0\.0\.1:\d+", "…", why.replace(f"{self.directory}/", ""))
            self.counts.errors.append(f"{child.name.partition('-')[0]}: {why}")
            self._restart(child)
        elif status != 0:
            raise ChaosFailure(f"{child.name} ended with status {status}, which no fault explains")

    def _training_is_over(self) -> bool:
        """Capture may hear of it before we do, and training may be stopped or killed after it has told."""
        self.train.wait(10.0)
        prompts = len(prompt_ids(self.run, "train"))
        return self.finished or self.steps >= EPOCHS * -(-prompts // WINDOW)

    def _restart(self, child: Child) -> None:
        if not self.finished:
            self._due[child.name] = time.monotonic() + _RESTART_SECONDS

    def _explained(self, said: str) -> str | None:
        """The error that ended a process, where a fault of late may cause it."""
        error = next((line for line in reversed(said.splitlines()) if line.startswith("error: ")), "")
        now = time.monotonic()
        late = [fault for fault in self.faults if now - fault.at < EXPLAINED_SECONDS]
        causes = [pattern for fault in late for pattern in fault.explains]
        flat = " ".join(said.split())
        return error or flat[-100:] if any(pattern in flat for pattern in causes) else None

    def begin_fault(self, kind: str, detail: str, explains: Sequence[str] = ()) -> Injected:
        fault = Injected(kind, detail, time.monotonic(), self.steps, explains)
        self.faults.append(fault)
        return fault

    def finish(self, *, seconds: float) -> None:
        """Let the run come to its end undisturbed."""
        if not self.wait_for(lambda: False, seconds=seconds):
            raise ChaosFailure(f"training did not finish within {seconds:g} s of the last fault")
        until = time.monotonic() + _END_SECONDS
        while any(child.started for child in self.captures):
            self.tick()
            if time.monotonic() > until:
                running = [child.name for child in self.captures if child.started]
                raise ChaosFailure(f"{', '.join(running)} did not end within {_END_SECONDS:g} s of training")
            time.sleep(_TICK_SECONDS)

    def judge(self, reference: Result) -> None:
        """:raises ChaosFailure: with everything that is wrong."""
        problems = problems_of(self.run, reference) + self.wires.leftovers(self.run)
        if problems:
            raise ChaosFailure("\n".join(problems[:20]))

    def tell(self) -> str:
        """Everything one needs to understand a failure."""
        lines = [f"world {self.directory}: {self.steps} steps, {time.monotonic() - self.began:.0f} s"]
        for fault in self.faults:
            healed = "not recovered" if fault.recovered_seconds is None else f"{fault.recovered_seconds:.1f} s"
            at = f"at {fault.at - self.began:6.1f} s, step {fault.step:3}"
            lines.append(f"  {at}: {fault.kind} {fault.detail}: {healed}")
        lines += [f"  ended with an error: {error}" for error in self.counts.errors]
        for child in self.children:
            state = "running" if child.running else "not running"
            lines += [f"-- {child.name} ({state}, started {child.starts} times) ends with:", child.said()]
        return "\n".join(lines)

    def keep_evidence(self) -> None:
        """End the processes and copy what is on the small disk, which goes with the world."""
        self._end_processes()
        if (disk := self.directory / "disk").is_dir():
            shutil.copytree(disk, self.directory / "disk-at-the-end", ignore=shutil.ignore_patterns("filler"))

    def close(self) -> None:
        self._end_processes()
        self.wires.close()

    def _end_processes(self) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait(10.0)
