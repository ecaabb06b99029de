# SPDX-License-Identifier: Apache-2.0
"""A world whose halves are joined by a real Mooncake master and a real Redis server, and what is done to these."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chaos_world import World
from mooncake_service import MooncakeService
from redis_service import RedisService

_SEGMENT_BYTES = 32 << 20
_REDIS_SECONDS = 5.0
_REDIS_GONE = ("server cannot be reached", "no secure connection", "Redis", "redis")
_MASTER_GONE = ("no answer within", "no mooncake master answers", "mooncake")
_QUIET_VENDOR = "GLOG_minloglevel"
_NO_ROOM = ("do not fit into the memory",)
_LEFTOVER_SECONDS = 10.0
_FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class ServiceWires:
    """The `mooncake` store and the `redis` channel.

    The memory for features is with a process of its own (as `specforge services mooncake` brings it) or with the
    capture processes, with whom it goes. Redis forgets everything when it is killed, or keeps it in a file.
    """

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.run_id = f"chaos-{directory.name}"
        self.keeps = chance.random() < 0.5
        self.holds = chance.random() < 0.5
        self._clock = directory / "redis.clock"
        self.set_clock(0.0)
        with self._own_clock():
            self.redis = RedisService(directory / "redis", appendonly=self.keeps)
        self.mooncake = MooncakeService()
        self._holder: Any = None
        self._token = "a secret of this run alone"
        self.bring_memory()
        segment = 0 if self.holds else _SEGMENT_BYTES
        self.sections: dict[str, dict[str, object]] = {
            "store": {
                "name": "mooncake",
                "master": self.mooncake.address,
                "host": "127.0.0.1",
                "segment_bytes": segment,
                "deadline_seconds": 10.0,
            },
            "channel": {
                "name": "redis",
                "url": self.redis.url,
                "lease_seconds": 3.0,
                "reconnect_seconds": _REDIS_SECONDS,
            },
        }

    @property
    def has_clock(self) -> bool:
        """Redis's wall clock can be set: libfaketime is installed."""
        return _FAKETIME is not None

    def set_clock(self, ahead_seconds: float) -> None:
        """Set Redis's wall clock against everybody else's."""
        aside = self._clock.with_suffix(".aside")
        aside.write_text(f"{ahead_seconds:+.0f}\n")
        aside.replace(self._clock)

    @contextmanager
    def _own_clock(self) -> Iterator[None]:
        """What is started meanwhile goes by a clock of its own, and allocates with libc: Redis's own allocator asks
        for the time before libfaketime can tell it."""
        settings = {"FAKETIME_TIMESTAMP_FILE": str(self._clock), "FAKETIME_NO_CACHE": "1"}
        settings |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "LD_PRELOAD": f"{_FAKETIME} libc.so.6"}
        if _FAKETIME is not None:
            os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                os.environ.pop(name, None)

    def restart_redis(self) -> None:
        with self._own_clock():
            self.redis.restart()

    def bring_memory(self) -> None:
        """A client in this process that holds features; also one that fills them with its own."""
        from mooncake.store import MooncakeDistributedStore
        from specforge_mooncake_store.vendor_environment import limit_waits

        os.environ.setdefault(_QUIET_VENDOR, "3")
        limit_waits("127.0.0.1")
        if self._holder is not None:
            self._holder.close()
        self._holder = MooncakeDistributedStore()
        segment = _SEGMENT_BYTES if self.holds else 0
        address = self.mooncake.address
        assert self._holder.setup("127.0.0.1", "P2PHANDSHAKE", segment, 16 << 20, "tcp", "", address) == 0

    def fill(self, names: list[str]) -> None:
        """Put objects until nothing fits any more."""
        from mooncake.store import ReplicateConfig

        pinned = ReplicateConfig()
        pinned.with_hard_pin = True
        for size in (1 << 20, 1 << 14, 1 << 10):
            for _ in range(1000):
                name = f"filler/{len(names)}/{time.monotonic_ns()}"
                if self._holder.put(name, bytes(size), pinned) != 0:
                    break
                names.append(name)

    def make_room(self, names: list[str]) -> None:
        for name in names:
            self._holder.remove(name, True)

    def leftovers(self, run: Path) -> list[str]:
        channel = self.redis.channel(self.run_id, token=self._token)
        writer, desk = channel.writer("oracle"), channel.leases()
        found = [f"left in flight: {ref.sample_id} g{ref.generation}" for ref in writer.published()]
        found += [f"left to capture: {batch.key}" for batch in desk.outstanding()]
        writer.close()
        desk.close()
        until = time.monotonic() + _LEFTOVER_SECONDS  # what the master had leased to a reader goes when that is over
        while (keys := self._keys()) and time.monotonic() < until:
            time.sleep(0.2)
        return found + [f"left in the store: {key}" for key in keys]

    def put_keys(self) -> set[str]:
        """What is in the store at this moment; nothing while its master is not there."""
        try:
            return set(self._keys())
        except OSError:
            return set()

    def _keys(self) -> list[str]:
        return [key for key in self.mooncake.keys(self.run_id) if ".e" in key or "held-out" in key]

    def close(self) -> None:
        with suppress(Exception):
            self._holder.close()
        self.mooncake.stop()
        self.redis.stop()


def _services(world: World) -> ServiceWires:
    assert isinstance(world.wires, ServiceWires)
    return world.wires


def kill_redis(world: World, chance: random.Random) -> None:
    wires = _services(world)
    seconds = chance.choice([0.0, chance.uniform(0.2, 2.0), chance.uniform(2.0, 8.0)])
    how = "with its file" if wires.keeps else "empty"
    explains = _REDIS_GONE if seconds > _REDIS_SECONDS / 2 else ()
    world.begin_fault("kill redis", f"back {how} after {seconds:.1f} s", explains)
    wires.redis.kill()
    world.pass_time(seconds)
    wires.restart_redis()


def stall_redis(world: World, chance: random.Random) -> None:
    seconds = chance.uniform(0.3, 6.0)
    explains = _REDIS_GONE if seconds > _REDIS_SECONDS / 2 else ()
    world.begin_fault("stall redis", f"for {seconds:.1f} s", explains)
    _services(world).redis.stand_still()
    world.pass_time(seconds)
    _services(world).redis.go_on()


def redis_clock(world: World, chance: random.Random) -> None:
    """Redis's clock jumps, by which it tells who lives."""
    hours = chance.choice([-24.0, -0.001, 0.001, 1.0, 24.0 * 30])
    world.begin_fault("redis clock", f"{hours:+g} h")
    _services(world).set_clock(hours * 3600)
    world.pass_time(chance.uniform(0.2, 2.0))
    if chance.random() < 0.5:
        _services(world).set_clock(0.0)


def kill_master(world: World, chance: random.Random) -> None:
    wires = _services(world)
    seconds = chance.choice([0.0, chance.uniform(0.2, 2.0), chance.uniform(2.0, 8.0)])
    holder = "; memory beside it" if wires.holds else ""
    world.begin_fault("kill master", f"back after {seconds:.1f} s{holder}", _MASTER_GONE)
    wires.mooncake.kill()
    world.pass_time(seconds)
    wires.mooncake.restart()
    wires.bring_memory()


def full_segment(world: World, chance: random.Random) -> None:
    wires, names = _services(world), list[str]()
    seconds = chance.uniform(0.3, 3.0)
    world.begin_fault("full segment", f"for {seconds:.1f} s", _NO_ROOM)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        wires.fill(names)
        world.pass_time(0.1)
    wires.make_room(names)
