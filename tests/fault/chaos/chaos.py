# SPDX-License-Identifier: Apache-2.0
"""The fault harness: disaggregated runs to which everything happens, judged by what they end with.

::

    PYTHONPATH=tests/support python tests/fault/chaos/chaos.py --faults 200 --seed 7 [--wires file|services]

Runs ("worlds") follow one another until so many faults were injected. Each must end with the weights of a run that
nothing happened to, with every sample trained in its window once, and with nothing left behind.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos_faults import faults_of
from chaos_files import FileWires
from chaos_oracle import Result, result_of
from chaos_processes import processes_of
from chaos_services import ServiceWires
from chaos_world import ChaosFailure, Injected, World, WorldWires
from tiny_model import TinyModel, write_tiny_model

RECOVERY_SECONDS = 60.0
UNDISTURBED_SECONDS = 150.0
_FAULTS_AT_ONCE = 0.2  # so often the next fault does not wait for recovery from the last

WIRES: dict[str, Callable[[Path, random.Random], WorldWires]] = {
    "file": lambda directory, _: FileWires(directory),
    "services": ServiceWires,
}


@dataclass
class Campaign:
    """Worlds one after another, all decided by one seed (but for how the machine interleaves them)."""

    root: Path
    model: TinyModel
    seed: int
    say: Callable[[str], None] = print
    injected: list[tuple[str, Injected]] = field(default_factory=list)
    restarts_after_kill: int = 0
    restarts_after_error: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    worlds: int = 0
    _reference: Result | None = None

    def reference(self) -> Result:
        """What a run over files ends with that nothing happens to; whatever joins its halves must change nothing."""
        if self._reference is None:
            world = self._world("file", random.Random(0), name="undisturbed")
            try:
                world.start()
                world.finish(seconds=UNDISTURBED_SECONDS)
                self._reference = result_of(world.run)
                world.judge(self._reference)
            except BaseException:
                self.say(world.tell())
                raise
            finally:
                world.close()
        return self._reference

    def run(self, wires: str, faults: int, *, seconds: float) -> None:
        """Inject at least so many faults. :raises ChaosFailure: the first run that is not as it must be."""
        until, wanted = time.monotonic() + seconds, len(self.injected) + faults
        self.reference()
        while len(self.injected) < wanted:
            self.worlds += 1
            chance = random.Random(f"{self.seed}/{wires}/{self.worlds}")
            self._run_world(wires, chance, faults=wanted - len(self.injected), until=until)

    def _world(self, wires: str, chance: random.Random, *, name: str) -> World:
        directory = self.root / name
        directory.mkdir()
        return World(
            directory,
            self.model,
            wires=WIRES[wires](directory, chance),
            captures=chance.choice([2, 2, 3]),
            retain=chance.choice(["checkpoint", "window"]),
        )

    def _run_world(self, wires: str, chance: random.Random, *, faults: int, until: float) -> None:
        world = self._world(wires, chance, name=f"{wires}-{self.seed}-{self.worlds}")
        try:
            world.start()
            while not world.finished and len(world.faults) < faults:
                if time.monotonic() > until:
                    raise ChaosFailure("the harness itself takes too long")
                self._inject(world, chance)
            world.finish(seconds=UNDISTURBED_SECONDS)
            world.judge(self.reference())
        except BaseException:
            world.keep_evidence()
            self.say(f"seed {self.seed}, world {self.worlds} over {wires}:\n{world.tell()}")
            raise
        finally:
            world.close()
        if left := processes_of(world.directory):
            raise ChaosFailure(f"left running after world {self.worlds}: {', '.join(left)}")
        self._count(wires, world)
        shutil.rmtree(world.directory, ignore_errors=True)

    def _inject(self, world: World, chance: random.Random) -> None:
        world.pass_time(chance.uniform(0.0, 1.0))
        faults = faults_of(world)
        name = chance.choice(sorted(faults))
        if world.finished:
            return
        faults[name](world, chance)
        fault = world.faults[-1]
        if chance.random() < _FAULTS_AT_ONCE:
            return
        before, since = max(f.step for f in world.faults), time.monotonic()
        if not world.wait_for(lambda: world.steps > before, seconds=RECOVERY_SECONDS):
            raise ChaosFailure(f"training made no step for {RECOVERY_SECONDS:g} s after: {fault.kind} {fault.detail}")
        fault.recovered_seconds = time.monotonic() - since

    def _count(self, wires: str, world: World) -> None:
        self.injected += [(wires, fault) for fault in world.faults]
        self.restarts_after_kill += world.counts.restarts_after_kill
        self.restarts_after_error += world.counts.restarts_after_error
        self.errors.update(world.counts.errors)
        took = time.monotonic() - world.began
        self.say(
            f"world {self.worlds} over {wires}: {len(world.faults)} faults in {took:.0f} s, the same weights; "
            f"{len(self.injected)} faults so far"
        )

    def table(self) -> str:
        """Faults by wires and kind, and how long recovery took at most."""
        lines = [f"{'wires':<10}{'fault':<16}{'injected':>9}{'slowest recovery':>18}"]
        for wires, kind in sorted({(wires, fault.kind) for wires, fault in self.injected}):
            faults = [fault for where, fault in self.injected if (where, fault.kind) == (wires, kind)]
            slowest = max((fault.recovered_seconds or 0.0 for fault in faults), default=0.0)
            lines.append(f"{wires:<10}{kind:<16}{len(faults):>9}{slowest:>16.1f} s")
        lines.append(
            f"{len(self.injected)} faults in {self.worlds} runs, seed {self.seed}; processes started again: "
            f"{self.restarts_after_kill} killed, {self.restarts_after_error} ended by an error that a fault explains"
        )
        return "\n".join([*lines, *(f"  {count} x {error}" for error, count in self.errors.most_common(12))])


def main() -> None:
    parser = argparse.ArgumentParser(description="Inject faults into disaggregated runs.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--wires", choices=[*WIRES], help="default: all, in turns")
    parser.add_argument("--minutes", type=float, default=60.0, help="the harness gives up after so long")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="specforge-chaos-"))
    (root / "model").mkdir()
    campaign = Campaign(root, write_tiny_model(root / "model"), given.seed, say=lambda text: print(text, flush=True))
    chosen = [given.wires] if given.wires else [*WIRES]
    try:
        for number, wires in enumerate(chosen):
            share = given.faults // len(chosen) + (number < given.faults % len(chosen))
            campaign.run(wires, share, seconds=60 * given.minutes)
    except ChaosFailure as failure:
        print(f"FAILED (logs in {root}): {failure}", flush=True)
        sys.exit(1)
    finally:
        print(campaign.table(), flush=True)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
