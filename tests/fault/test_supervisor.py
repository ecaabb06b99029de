# SPDX-License-Identifier: Apache-2.0
"""Supervision of halves that are processes: the policy as a table, the rest with small processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

import pytest
from specforge_core.contracts import SpecForgeError, StopSignal
from specforge_core.run.supervisor import Half, Phase, SupervisionPolicy, supervise

pytestmark = pytest.mark.timeout(60)

DEADLINE_SECONDS = 20.0

# -- the policy --------------------------------------------------------------------------------------------------------

KILLED = -int(signal.SIGKILL)
RUNNING, FINISHING, STOPPING = Phase.RUNNING, Phase.FINISHING, Phase.STOPPING


@dataclass(frozen=True)
class Case:
    """What happened to `train` (main), `capture` and `once` (not restartable), each may be restarted twice; and what
    follows from the last of it."""

    name: str
    happened: Sequence[tuple[str, int] | str]
    phase: Phase
    status: int = 0
    restart_after: float | None = None
    message: str = ""
    show_log: bool = False


CASES = [
    Case("capture has nothing more to do", [("capture", 0)], RUNNING),
    Case("training finished", [("train", 0)], FINISHING),
    Case("all ended well", [("capture", 0), ("train", 0), ("once", 0)], FINISHING),
    Case(
        "crashed",
        [("capture", KILLED)],
        RUNNING,
        restart_after=0.5,
        message="capture was killed by SIGKILL: restart 1 of 2 in 0.5 s",
    ),
    Case("crashed again", [("capture", KILLED), ("capture", -int(signal.SIGSEGV))], RUNNING, restart_after=1.0),
    Case("each has its own", [("capture", KILLED), ("train", KILLED)], RUNNING, restart_after=0.5),
    Case(
        "crashed too often",
        [("capture", KILLED)] * 3,
        STOPPING,
        status=137,
        message="capture was killed by SIGKILL: the run ends",
        show_log=True,
    ),
    Case(
        "not restartable",
        [("once", -40)],
        STOPPING,
        status=168,
        message="once was killed by signal 40: the run ends",
        show_log=True,
    ),
    Case(
        "capture failed",
        [("capture", 2)],
        STOPPING,
        status=2,
        message="capture ended with status 2: the run ends",
        show_log=True,
    ),
    Case("train failed", [("train", 2)], STOPPING, status=2, message="train ended with status 2: the run ends"),
    Case("the first failure counts", [("capture", 2), ("train", 3)], STOPPING, status=2),
    Case("failed, then interrupted", [("train", 2), "interrupted"], STOPPING, status=2),
    Case("interrupted", ["interrupted"], STOPPING, status=130),
    Case("interrupted, then crashed", ["interrupted", ("train", KILLED)], STOPPING, status=130),
    Case("interrupted, then finished", ["interrupted", ("train", 0)], STOPPING, status=130),
    Case("finished, then interrupted", [("train", 0), "interrupted"], STOPPING, status=130),
    Case(
        "failed after the end",
        [("train", 0), ("capture", 2)],
        FINISHING,
        message="capture ended with status 2 after training had finished",
        show_log=True,
    ),
    Case(
        "crashed after the end",
        [("train", 0), ("capture", KILLED)],
        FINISHING,
        message="capture was killed by SIGKILL after training had finished",
    ),
    Case("did not end by itself", [("train", 0), "waited_enough", ("capture", 130)], STOPPING),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_an_end_means(case: Case) -> None:
    halves = [Half(name="train", command=()), Half(name="capture", command=())]
    halves += [Half(name="once", command=(), restartable=False)]
    policy = SupervisionPolicy(halves, main="train", restarts=2)
    verdict = None
    for event in case.happened:
        verdict = getattr(policy, event)() if isinstance(event, str) else policy.ended(*event)
    assert (policy.phase, policy.status) == (case.phase, case.status)
    if verdict is not None:
        assert verdict.restart_after == case.restart_after
        assert verdict.show_log == case.show_log
        assert case.message in verdict.message


def test_pauses_grow_to_a_limit() -> None:
    policy = SupervisionPolicy([Half(name="capture", command=())], main="train", restarts=8)
    assert [policy.ended("capture", KILLED).restart_after for _ in range(9)] == [0.5, 1, 2, 4, 8, 15, 15, 15, None]


# -- real processes ----------------------------------------------------------------------------------------------------

# What the scripts below begin with: `note` leaves a line behind, `wait_for` waits for one.
PRELUDE = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
notes = Path(sys.argv[1])
def note(line):
    with open(notes, "a") as file:
        file.write(line + chr(10))
def wait_for(line, count=1):
    deadline = time.monotonic() + {DEADLINE_SECONDS}
    while not notes.exists() or notes.read_text().splitlines().count(line) < count:
        if time.monotonic() > deadline:
            sys.exit("never saw " + line)
        time.sleep(0.01)
def on_term(status):
    def handle(number, frame):
        note(name + " was told to end")
        os._exit(status)
    signal.signal(signal.SIGTERM, handle)
name = sys.argv[2]
note(name + " pid " + str(os.getpid()))
"""
WAITS = "on_term(130); note(name + ' waits'); time.sleep(60)"
IGNORES = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note(name + ' waits'); time.sleep(60)"
CRASHES = "os.kill(os.getpid(), signal.SIGKILL)"


def is_left(pid: int) -> bool:
    """Whether a process runs, or is a zombie that this process should have reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state != "Z" or int(parent) == os.getpid()


def wait_until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


@dataclass
class Bench:
    """Runs scripts as halves; ``notes`` is what they left behind."""

    folder: Path
    stop: StopSignal = field(default_factory=StopSignal)
    grace_seconds: float = DEADLINE_SECONDS
    restarts: int = 2

    @property
    def lines(self) -> list[str]:
        notes = self.folder / "notes"
        return notes.read_text().splitlines() if notes.exists() else []

    @property
    def pids(self) -> list[int]:
        return [int(line.split()[-1]) for line in self.lines if " pid " in line]

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def half(self, name: str, script: str) -> Half:
        return Half(name=name, command=[sys.executable, "-c", PRELUDE + script, str(self.folder / "notes"), name])

    def supervise(self, **scripts: str) -> int:
        return supervise(
            [self.half(name, script) for name, script in scripts.items()],
            main="train",
            logs=self.folder / "logs",
            stop=self.stop,
            restarts=self.restarts,
            grace_seconds=self.grace_seconds,
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Whatever the test did, in the end no process that it started is there."""
    made = Bench(tmp_path)
    yield made
    left = [pid for pid in made.pids if is_left(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_all_halves_run_to_their_end(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.log("capture").parent.mkdir()
    bench.log("capture").write_text("of an earlier run\n")
    status = bench.supervise(
        capture="note('captured'); print('captured 8 prompts', flush=True); print('slowly', file=sys.stderr)",
        train="wait_for('captured'); print('trained 8 samples')",
    )
    assert status == 0
    assert bench.log("capture").read_text() == "of an earlier run\ncaptured 8 prompts\nslowly\n"
    assert not bench.log("train").exists()
    out, err = capfd.readouterr()
    assert (out, err) == ("trained 8 samples\n", "")


@pytest.mark.parametrize("victim", ["capture", "train"])
def test_a_half_that_is_killed_is_started_again(victim: str, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    scripts = {
        "capture": "note('captured'); sys.exit(0)",
        "train": "wait_for('captured'); sys.exit(0)",
    }
    scripts[victim] = f"note('{victim} tries')\nif notes.read_text().count(' tries') < 3: {CRASHES}\n" + scripts[victim]
    assert bench.supervise(**scripts) == 0
    assert bench.lines.count(f"{victim} tries") == 3
    assert f"{victim} was killed by SIGKILL: restart 1 of 2 in 0.5 s" in capfd.readouterr().err


def test_a_half_that_is_killed_again_and_again_ends_the_run(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.restarts = 1
    words = "print('reading the target', flush=True); wait_for('train waits'); "
    assert bench.supervise(capture=words + CRASHES, train=WAITS) == 137
    assert "train was told to end" in bench.lines
    err = capfd.readouterr().err
    assert "capture was killed by SIGKILL: the run ends" in err
    assert err.count("  reading the target") == 1, "only the last process's words"


def test_a_half_that_says_what_is_wrong_ends_the_run(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.log("capture-1").parent.mkdir()
    bench.log("capture-1").write_text("of an earlier run\n")
    fails = "wait_for('train waits'); print(*range(100), sep=chr(10)); sys.exit(2)"
    halves = {"capture-0": "wait_for('never')", "capture-1": fails, "train": WAITS}
    assert bench.supervise(**halves) == 2
    assert "train was told to end" in bench.lines
    err = capfd.readouterr().err
    assert "capture-1 ended with status 2: the run ends" in err
    assert f"{bench.log('capture-1')} ends with:\n  80\n  81\n" in err
    assert "earlier" not in err


def test_training_that_fails_ends_the_run(bench: Bench) -> None:
    assert bench.supervise(capture=WAITS, train="wait_for('capture waits'); sys.exit(2)") == 2
    assert "capture was told to end" in bench.lines


def test_a_half_that_will_not_end_is_killed(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.grace_seconds = 0.3
    assert bench.supervise(capture="wait_for('train waits'); sys.exit(2)", train=IGNORES) == 2
    assert "train still runs and is killed" in capfd.readouterr().err


def test_after_training_the_others_may_end_by_themselves(bench: Bench) -> None:
    capture = "on_term(3); wait_for('trained'); time.sleep(0.3); note('capture ends')"
    assert bench.supervise(capture=capture, train="note('trained')") == 0
    assert "capture ends" in bench.lines
    assert "capture was told to end" not in bench.lines


def test_after_training_the_others_are_told_and_then_made_to_end(bench: Bench) -> None:
    bench.grace_seconds = 0.3
    halves = {"capture-0": WAITS, "capture-1": IGNORES}
    train = "wait_for('capture-0 waits'); wait_for('capture-1 waits')"
    assert bench.supervise(**halves, train=train) == 0
    assert "capture-0 was told to end" in bench.lines


def test_after_training_nothing_is_started_again(bench: Bench) -> None:
    train = "wait_for('capture is killed'); time.sleep(0.2)"
    assert bench.supervise(capture=f"note('capture is killed'); {CRASHES}", train=train) == 0
    assert bench.lines.count("capture is killed") == 1


def test_a_stop_is_passed_on(bench: Bench) -> None:
    bench.stop.request("interrupted by SIGINT")
    assert bench.supervise(capture="time.sleep(60)", train="time.sleep(60)") == 130

    def request_a_stop() -> None:
        wait_until(lambda: {"train waits", "capture waits"} <= set(bench.lines))
        bench.stop.request("interrupted by SIGINT")

    bench.stop = StopSignal()
    timer = Timer(0, request_a_stop)
    timer.start()
    assert bench.supervise(capture=WAITS, train=WAITS) == 130
    timer.join()
    assert {"capture was told to end", "train was told to end"} <= set(bench.lines)


def test_after_a_stop_nothing_is_started_again(bench: Bench) -> None:
    starts = []

    def request_a_stop() -> None:
        wait_until(lambda: bench.lines.count("capture crashes") == 2)
        time.sleep(0.3)  # of the second that it now waits for its restart
        bench.stop.request("interrupted by SIGINT")
        starts.append(bench.lines.count("capture crashes"))

    timer = Timer(0, request_a_stop)
    timer.start()
    assert bench.supervise(capture=f"note('capture crashes'); {CRASHES}", train="time.sleep(60)") == 130
    timer.join()
    assert [bench.lines.count("capture crashes")] == starts == [2]


def test_what_a_half_started_ends_with_it(bench: Bench) -> None:
    child = "note('child pid ' + str(subprocess.Popen(['sleep', '60']).pid)); "
    assert bench.supervise(capture=child + "sys.exit(0)", train=child + "sys.exit(0)") == 0
    assert wait_until(lambda: not any(is_left(pid) for pid in bench.pids))


def test_a_half_that_cannot_be_started_leaves_none_running(bench: Bench) -> None:
    halves = [bench.half("train", WAITS), Half(name="capture-7", command=["/no/such/program"])]
    with pytest.raises(SpecForgeError, match=r"capture-7 process: cannot be started: .*No such file"):
        supervise(halves, main="train", logs=bench.folder, stop=bench.stop, restarts=2, grace_seconds=1)


# -- the supervisor itself ---------------------------------------------------------------------------------------------

SUPERVISOR = """
import sys
from pathlib import Path
from specforge_core.contracts import StopSignal
from specforge_core.run.interrupt import stop_on_signal
from specforge_core.run.supervisor import Half, supervise

notes, script, stop = sys.argv[1], sys.argv[2], StopSignal()
halves = [Half(name=n, command=[sys.executable, "-c", script, notes, n]) for n in ("train", "capture")]
with stop_on_signal(stop):
    logs = Path(notes).parent
    sys.exit(supervise(halves, main="train", logs=logs, stop=stop, restarts=2, grace_seconds=20))
"""


def start_supervisor(bench: Bench, script: str) -> subprocess.Popen[str]:
    """A supervisor of two halves, both of which wait."""
    command = [sys.executable, "-c", SUPERVISOR, str(bench.folder / "notes"), PRELUDE + script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert wait_until(lambda: {"train waits", "capture waits"} <= set(bench.lines))
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize("script", [WAITS, IGNORES], ids=["waits", "ignores"])
def test_no_half_survives_the_supervisor(script: str, bench: Bench) -> None:
    process = start_supervisor(bench, script)
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL
    assert len(bench.pids) == 2
    assert wait_until(lambda: not any(is_left(pid) for pid in bench.pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_run_in_order(number: signal.Signals, bench: Bench) -> None:
    process = start_supervisor(bench, WAITS)
    process.send_signal(number)
    assert end_of(process) == (130, "")
    assert {"capture was told to end", "train was told to end"} <= set(bench.lines)


def test_a_second_ctrl_c_ends_it_at_once(bench: Bench) -> None:
    process = start_supervisor(bench, IGNORES)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert end_of(process) == (130, "")
    assert wait_until(lambda: not any(is_left(pid) for pid in bench.pids))
