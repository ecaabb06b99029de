# SPDX-License-Identifier: Apache-2.0
"""The faults: what is done to a world, at which moment, and which errors it explains."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from chaos_files import FileWires
from chaos_processes import Child
from chaos_services import ServiceWires, full_segment, kill_master, kill_redis, redis_clock, stall_redis
from chaos_world import World

Fault = Callable[[World, random.Random], None]

_MOMENT_SECONDS = 3.0
_NO_ROOM = ("No space left", "no room", "do not fit")


def _capture(world: World, chance: random.Random) -> Child:
    return chance.choice(world.captures)


def _at_a_moment(world: World, chance: random.Random, moments: Mapping[str, Callable[[], bool]]) -> str:
    """Wait for a moment of one of these kinds, or for none."""
    name = chance.choice(["any time", *moments])
    if name != "any time":
        world.wait_for(moments[name], seconds=_MOMENT_SECONDS, pause=0.0005)
        world.pass_time(chance.uniform(0.0, 0.01))
    return name


def _writing_checkpoint(world: World) -> Callable[[], bool]:
    return lambda: any((world.run / "checkpoints").glob(".partial-*"))


def _fresh_features(world: World) -> Callable[[], bool]:
    """A sample was put a moment ago; its ref is not published yet, or was just now."""
    wires = world.wires
    assert isinstance(wires, FileWires | ServiceWires)
    before = wires.put_keys()
    return lambda: bool(wires.put_keys() - before)


def _starting(child: Child, world: World, chance: random.Random) -> None:
    """Kill a process, and what takes its place once more while it starts."""
    child.kill()
    starts = child.starts
    world.wait_for(lambda: child.starts > starts, seconds=_MOMENT_SECONDS)
    world.pass_time(chance.uniform(0.0, 1.5))


def kill_capture(world: World, chance: random.Random) -> None:
    child = _capture(world, chance)
    if chance.random() < 0.25:
        world.begin_fault("kill capture", f"{child.name}, while it starts")
        _starting(child, world, chance)
        child.kill()
        return
    moment = _at_a_moment(world, chance, {"features put": _fresh_features(world)})
    victims = world.captures if moment == "features put" else [child]
    world.begin_fault("kill capture", f"{', '.join(victim.name for victim in victims)}, {moment}")
    for victim in victims:
        victim.kill()


def kill_train(world: World, chance: random.Random) -> None:
    if chance.random() < 0.25:
        world.begin_fault("kill train", "while it starts")
        _starting(world.train, world, chance)
        world.train.kill()
        return
    moment = _at_a_moment(world, chance, {"checkpoint": _writing_checkpoint(world)})
    world.begin_fault("kill train", moment)
    world.train.kill()


def kill_all(world: World, chance: random.Random) -> None:
    moment = _at_a_moment(
        world, chance, {"checkpoint": _writing_checkpoint(world), "features put": _fresh_features(world)}
    )
    world.begin_fault("kill all", moment)
    for child in world.children:
        child.kill()


def stall_train(world: World, chance: random.Random) -> None:
    _stall(world, [world.train], "stall train", seconds=chance.uniform(0.5, 4.0))


def stall_capture(world: World, chance: random.Random) -> None:
    children = chance.choice([[_capture(world, chance)], world.captures])
    _stall(world, children, "stall capture", seconds=chance.uniform(0.5, 6.0))


def _stall(world: World, children: list[Child], kind: str, *, seconds: float) -> None:
    world.begin_fault(kind, f"{', '.join(child.name for child in children)} for {seconds:.1f} s")
    for child in children:
        child.send(signal.SIGSTOP)
    world.pass_time(seconds)
    for child in children:
        child.send(signal.SIGCONT)


def full_disk(world: World, chance: random.Random) -> None:
    wires = world.wires
    assert isinstance(wires, FileWires)
    seconds = chance.uniform(0.3, 3.0)
    world.begin_fault("full disk", f"for {seconds:.1f} s", _NO_ROOM)
    filler = wires.fill()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        world.pass_time(0.1)
        wires.fill()  # what was freed meanwhile as well
    filler.unlink()


def torn_record(world: World, chance: random.Random) -> None:
    wires = world.wires
    assert isinstance(wires, FileWires)
    child = _capture(world, chance)
    world.begin_fault("torn record", child.name)
    child.kill()
    child.wait(5.0)
    torn = [path.name for path in _abandoned(wires) if wires.tear(path)]
    world.faults[-1].detail += f": {', '.join(torn) or 'nothing to tear'}"


def _abandoned(wires: FileWires) -> Iterator[Path]:
    """The newest file of a writer, which the killed one kept, perhaps (others are locked), and the lease log."""
    yield from sorted(wires.refs.glob("*.refs"), key=lambda path: path.stat().st_mtime)[-3:]
    yield from wires.refs.glob("leases.log")


def clock_jump(world: World, chance: random.Random) -> None:
    """Wall clocks of some processes, and the heartbeats they left, go hours into the future or the past."""
    hours = chance.choice([-48.0, -1.0, 1.0, 24.0 * 400])
    children = [child for child in world.children if chance.random() < 0.6] or [world.train]
    world.begin_fault("clock jump", f"{hours:+g} h for {', '.join(child.name for child in children)}")
    for child in children:
        child.clock.write_text(str(hours * 3600))
    if isinstance(world.wires, FileWires):
        stamp = time.time() + hours * 3600
        for path in [*world.wires.refs.glob("*.refs"), *world.wires.refs.glob("*.acks")]:
            with suppress(FileNotFoundError):
                os.utime(path, (stamp, stamp))
    world.pass_time(chance.uniform(0.2, 1.0))
    if chance.random() < 0.5:  # and back
        for child in children:
            child.clock.write_text("0")


def faults_of(world: World) -> dict[str, Fault]:
    """What can be done to a world, by name."""
    faults: dict[str, Fault] = {
        "kill capture": kill_capture,
        "kill train": kill_train,
        "kill all": kill_all,
        "stall train": stall_train,
        "stall capture": stall_capture,
        "clock jump": clock_jump,
    }
    if isinstance(world.wires, FileWires):
        faults["torn record"] = torn_record
        if world.wires.small:
            faults["full disk"] = full_disk
    if isinstance(world.wires, ServiceWires):
        faults |= {
            "kill redis": kill_redis,
            "stall redis": stall_redis,
            "kill master": kill_master,
            "full segment": full_segment,
        }
        if world.wires.has_clock:
            faults["redis clock"] = redis_clock
    return faults
