# SPDX-License-Identifier: Apache-2.0
"""What the redis channel does when its server is killed, stands still, is full or is not ours, or a process dies."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from redis_service import RedisService, fresh_run, redis_service, wait_until
from specforge_core.contracts import (
    AccessDenied,
    CaptureBatch,
    ChannelError,
    InFlight,
    PeerDied,
    RefReader,
    RefWriter,
    SampleRef,
)
from specforge_core.testing.samples import make_ref

DEADLINE = 30.0
HOLDER = """
import sys, time
from pathlib import Path
from specforge_core.contracts import PartContext
from specforge_redis_channel.channel import RedisChannel
from specforge_redis_channel.config import RedisChannelConfig
url, run, name = sys.argv[1:]
config = RedisChannelConfig(name="redis", url=url, lease_seconds=1.0)
channel = RedisChannel(config, PartContext(run_id=run, directory=Path()))
writer = channel.writer(name)
print(channel.leases().take(name, 10.0).batch.key, flush=True)
time.sleep(60)
"""
STOPPED_HOLDER = HOLDER.replace(
    "print(channel.leases().take(name, 10.0).batch.key, flush=True)\ntime.sleep(60)",
    """desk = channel.leases()
lease = desk.take(name, 10.0)
print(lease.batch.key, flush=True)
sys.stdin.readline()
from specforge_core.testing.samples import make_ref
writer.publish([make_ref(0)])
desk.finish(lease)
print("finished", flush=True)
time.sleep(60)""",
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RedisService]:
    with redis_service(tmp_path / "redis") as running:
        yield running


def batch(first: int) -> CaptureBatch:
    return CaptureBatch(split="train", epoch=0, first=first, count=4, wanted=(0, 2), fingerprint="f")


def publish_all(writer: RefWriter, refs: list[SampleRef], *, pause: float) -> None:
    for first in range(0, len(refs), 7):
        writer.publish(refs[first : first + 7])
        time.sleep(pause)
    writer.close()


def read_until_drained(reader: RefReader) -> list[SampleRef]:
    seen: list[SampleRef] = []
    deadline = time.monotonic() + DEADLINE
    while not reader.drained and time.monotonic() < deadline:
        fresh = reader.poll(5, 0.1)
        seen += fresh
        reader.ack([ref.sample_id for ref in fresh[:3]], step=1)
        reader.ack([ref.sample_id for ref in fresh[3:]], step=1)
    return seen


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """The thread, and what it ended with: a result or an error."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except ChannelError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_a_killed_server_with_its_log_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    with redis_service(tmp_path / "redis", appendonly=True) as service, ThreadPoolExecutor(3) as pool:
        channel = service.channel(fresh_run(), lease_seconds=5.0)
        writers = [channel.writer(f"capture-{index}") for index in range(2)]
        reader = channel.reader()
        refs = [[make_ref(1000 * index + number) for number in range(280)] for index in range(2)]
        done = [pool.submit(publish_all, w, r, pause=0.03) for w, r in zip(writers, refs, strict=True)]
        reading = pool.submit(read_until_drained, reader)
        for _ in range(4):
            time.sleep(0.3)
            service.kill()
            service.restart()
        for future in done:
            future.result(DEADLINE)
        seen = reading.result(DEADLINE)
        assert sorted(ref.sample_id for ref in seen) == sorted(ref.sample_id for both in refs for ref in both)
        for index, own in enumerate(refs):
            assert [ref for ref in seen if int(ref.prompt_id[7:]) // 1000 == index] == own
        last = channel.writer("capture-2")
        assert last.in_flight() == InFlight(0, 0)
        assert list(last.published()) == []
        last.close()
        reader.close()


def test_a_server_that_comes_back_empty_is_an_empty_channel(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    writer, reader, desk = channel.writer("capture-0"), channel.reader(), channel.leases()
    desk.offer([batch(0), batch(4)])
    lease = desk.take("capture-0", 5.0)
    assert lease is not None
    writer.publish([make_ref(number) for number in range(20)])
    held = reader.poll(5, 5.0)
    service.kill()
    service.restart()
    assert desk.outstanding() == []
    desk.finish(lease)
    reader.ack([ref.sample_id for ref in held], step=1)
    assert reader.poll(100, 0.1) == []
    assert writer.in_flight() == InFlight(0, 0)
    desk.offer([batch(8)])
    again = desk.take("capture-0", 5.0)
    assert again is not None
    assert (again.batch, again.attempt) == (batch(8), 1)
    writer.publish([make_ref(0), make_ref(50)])
    assert reader.poll(100, 5.0)[-1] == make_ref(50)
    reader.ack([make_ref(0).sample_id, make_ref(50).sample_id], step=2)
    assert writer.in_flight() == InFlight(0, 0)
    with pytest.raises(ChannelError, match="another process reads"):
        channel.reader()
    writer.close()
    assert reader.poll(1, 10.0) == []
    assert reader.drained
    reader.close()


def test_a_failure_after_an_empty_restart_is_told(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    for number in range(3):
        channel.writer(f"former-{number}").fail("long ago")
    writer, reader = channel.writer("capture-0"), channel.reader()
    service.kill()
    service.restart()
    assert reader.poll(1, 0.1) == []
    writer.fail("the disk is full")
    with pytest.raises(ChannelError, match="the disk is full"):
        reader.poll(1, 10.0)
    reader.close()


@pytest.mark.parametrize("what", ["publish", "poll", "take", "in_flight", "ack"])
def test_a_server_that_stays_away_is_an_error_in_time(service: RedisService, what: str) -> None:
    channel = service.channel(fresh_run(), reconnect_seconds=0.5)
    writer, reader, desk = channel.writer("capture-0"), channel.reader(), channel.leases()
    calls: dict[str, Callable[[], object]] = {
        "publish": lambda: writer.publish([make_ref(0)]),
        "poll": lambda: reader.poll(1, 60.0),
        "take": lambda: desk.take("capture-0", 60.0),
        "in_flight": writer.in_flight,
        "ack": lambda: reader.ack(["a"], step=1),
    }
    service.kill()
    begun = time.monotonic()
    with pytest.raises(ChannelError, match=r"127\.0\.0\.1.* cannot be reached, tried for 0.5 s"):
        calls[what]()
    reader.close()
    desk.close()
    with pytest.raises(ChannelError, match="cannot be reached"):
        writer.close()
    assert time.monotonic() - begun < 10
    service.restart()


def test_a_waiting_call_gives_up_when_its_side_is_closed(service: RedisService) -> None:
    channel = service.channel(fresh_run(), reconnect_seconds=60.0)
    reader = channel.reader()
    thread, found = in_background(lambda: reader.poll(1, 60.0))
    service.kill()
    time.sleep(0.3)
    begun = time.monotonic()
    reader.close()
    thread.join(DEADLINE)
    assert time.monotonic() - begun < 12
    assert isinstance(found[0], ChannelError)
    service.restart()


def test_a_server_that_stands_still_loses_nothing_and_kills_nobody(service: RedisService) -> None:
    channel = service.channel(fresh_run(), lease_seconds=1.0, reconnect_seconds=20.0)
    writer, other, reader, desk = channel.writer("a"), channel.writer("b"), channel.reader(), channel.leases()
    desk.offer([batch(0), batch(4)])
    lease = desk.take("a", 5.0)
    assert lease is not None
    service.stand_still()
    publishing, _ = in_background(lambda: writer.publish([make_ref(0), make_ref(1)]))
    asking, asked = in_background(lambda: channel.leases().take("b", 20.0))
    polling, polled = in_background(lambda: reader.poll(10, 20.0))
    time.sleep(3.0)
    service.go_on()
    for thread in (publishing, asking, polling):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert asked[0].batch == batch(4)
    assert desk.take("b", 0.5) is None, "the holder lives: only the server stood still"
    assert polled[0] == [make_ref(0), make_ref(1)]
    assert reader.poll(10, 0.2) == []
    assert writer.in_flight().refs == 2
    desk.finish(lease)
    assert desk.outstanding() == [batch(4)]
    for side in (writer, other, reader):
        side.close()


def test_nobody_is_judged_by_heartbeats_that_stood_still_with_the_server(service: RedisService) -> None:
    channel = service.channel(fresh_run(), lease_seconds=1.0)
    writers = [channel.writer(name) for name in ("a", "b")]
    reader, desk = channel.reader(), channel.leases()
    desk.offer([batch(0)])
    assert desk.take("a", 5.0) is not None
    assert desk.take("b", 1.5) is None
    for _ in range(3):
        service.stand_still()
        time.sleep(1.5)
        service.go_on()
        assert desk.take("b", 0.3) is None, "every call comes after the standstill: no connection was lost"
        assert reader.poll(1, 0.0) == []
        assert writers[0].in_flight() == InFlight(0, 0)
    for side in (*writers, reader):
        side.close()


def test_the_lease_of_a_killed_process_comes_back(service: RedisService) -> None:
    run = fresh_run()
    channel = service.channel(run)
    reader, desk = channel.reader(), channel.leases()
    desk.offer([batch(0)])
    command = [sys.executable, "-c", HOLDER, service.url, run, "doomed"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == batch(0).key
        writer = channel.writer("capture-0")
        assert desk.take("capture-0", 2.5) is None, "it lives, and renews its heartbeat"
    finally:
        holder.kill()
        holder.wait(DEADLINE)
    lease = desk.take("capture-0", DEADLINE)
    assert lease is not None
    assert (lease.batch, lease.attempt) == (batch(0), 2)
    writer.fail("enough")
    writer.close()
    reader.close()


def test_a_stopped_process_is_passed_over_and_does_no_harm_when_it_goes_on(service: RedisService) -> None:
    run = fresh_run()
    channel = service.channel(run)
    reader, desk, writer = channel.reader(), channel.leases(), channel.writer("capture-0")
    desk.offer([batch(0)])
    command = [sys.executable, "-c", STOPPED_HOLDER, service.url, run, "stopped"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == batch(0).key
        holder.send_signal(signal.SIGSTOP)
        lease = desk.take("capture-0", DEADLINE)
        assert lease is not None
        assert (lease.batch, lease.attempt) == (batch(0), 2)
        holder.stdin.write("go on\n")
        holder.stdin.flush()
        holder.send_signal(signal.SIGCONT)
        assert holder.stdout.readline().strip() == "finished"
        assert desk.outstanding() == [batch(0)], "it finished a lease that was not its own any more"
        desk.finish(lease)
        assert desk.outstanding() == []
        assert reader.poll(10, 5.0) == [make_ref(0)], "what it published late is there, for training to free"
    finally:
        holder.kill()
        holder.communicate(timeout=DEADLINE)
    writer.close()
    reader.close()


def test_the_lease_of_a_killed_process_comes_back_though_the_servers_clock_went_back(service: RedisService) -> None:
    """Its last heartbeat then ends a day from now, by the new clock."""
    run = fresh_run()
    channel = service.channel(run)
    desk = channel.leases()
    desk.offer([batch(0)])
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, service.url, run, "doomed"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == batch(0).key
        holder.kill()
    client = service.client()
    [alive] = client.keys("*:alive")
    client.zincrby(alive, 86_400_000, "w:doomed")
    writer = channel.writer("capture-0")
    assert desk.take("capture-0", DEADLINE) is not None
    writer.close()


def test_a_reader_that_died_is_replaced_and_one_that_lives_is_not(service: RedisService) -> None:
    run = fresh_run()
    first = service.channel(run).reader()
    with pytest.raises(ChannelError, match="another process reads this run's refs, which lives"):
        service.channel(run).reader()
    first._heart.leave(first._member)  # no heartbeat any more: what is left of a process that was killed
    begun = time.monotonic()
    second = service.channel(run).reader()
    assert time.monotonic() - begun < 5
    with pytest.raises(ChannelError, match="another process reads this run's refs now"):
        first.poll(1, 0.0)
    second.close()


def test_a_capture_process_hears_that_the_trainer_died_with_the_server(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    writer, reader = channel.writer("capture-0"), channel.reader()
    assert writer.in_flight() == InFlight(0, 0)
    reader._heart.leave(reader._member)
    reader._connection.close()
    service.kill()
    service.restart()

    def told() -> bool:
        try:
            writer.in_flight()
        except PeerDied:
            return True
        return False

    wait_until(told)
    writer.close()


def test_a_full_server_says_so_and_goes_on_once_there_is_room(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    writer, reader = channel.writer("capture-0"), channel.reader()
    refs = [make_ref(number) for number in range(100)]
    writer.publish(refs)
    service.client().config_set("maxmemory", 100_000)
    with pytest.raises(ChannelError, match="maxmemory") as raised:
        writer.publish([make_ref(200)])
    assert "raise maxmemory" in str(raised.value)
    assert reader.poll(100, 5.0) == refs
    reader.ack([ref.sample_id for ref in refs[:60]], step=1)
    reader.ack([ref.sample_id for ref in refs[60:]], step=2)
    time.sleep(1.5)
    assert writer.in_flight() == InFlight(0, 0), "heartbeats go through, too"
    service.client().config_set("maxmemory", 0)
    writer.publish([make_ref(201)])
    assert reader.poll(10, 5.0) == [make_ref(201)]
    writer.close()
    reader.close()


def test_a_replica_is_refused(service: RedisService) -> None:
    service.client().replicaof("127.0.0.1", "1")
    with pytest.raises(ChannelError, match="name the primary"):
        service.channel(fresh_run()).reader()


def test_a_server_that_would_drop_keys_is_refused(service: RedisService) -> None:
    client = service.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    service.channel(fresh_run()).reader().close()  # without a limit it never does
    client.config_set("maxmemory", "100mb")
    with pytest.raises(ChannelError, match="noeviction"):
        service.channel(fresh_run()).reader()


def test_a_user_with_no_more_rights_than_advised_is_enough(service: RedisService) -> None:
    client = service.client()
    client.acl_setuser(
        "worker", enabled=True, passwords=["+pw"], keys=["specforge:*"], categories=["+@all", "-@dangerous"]
    )
    channel = service.channel(fresh_run(), url=f"redis://worker:pw@127.0.0.1:{service.port}/0?protocol=3")
    writer, reader, desk = channel.writer("capture-0"), channel.reader(), channel.leases()
    writer.publish([make_ref(0), make_ref(1)])
    desk.offer([batch(0)])
    assert desk.take("capture-0", 5.0) is not None
    assert reader.poll(1, 5.0) == [make_ref(0)]
    reader.ack([make_ref(0).sample_id], step=1)
    assert list(writer.published()) == [make_ref(1)]
    reader.close()
    later = channel.reader()
    assert later.poll(9, 5.0) == [make_ref(1)]
    writer.close()
    later.close()


def test_something_that_is_no_redis_server_is_said(service: RedisService) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            with listening.accept()[0] as peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"redis://127.0.0.1:{listening.getsockname()[1]}/0"
        with pytest.raises(ChannelError, match="no Redis server"):
            service.channel(fresh_run(), url=url, reconnect_seconds=2.0).reader()
        thread.join(DEADLINE)


GARBAGE: list[dict[str, bytes]] = [
    {"x": b"y"},
    {"w": b"a", "l": b"[]", "r": b"not json"},
    {"w": b"a", "l": b"[]", "r": b'[0,["p"],0,1,3]'},
    {"w": b"a", "l": b'[["any",[["t","float32",null,[3]]]]]', "r": b'[0,["p"],0,-1,3]'},
    {"w": b"a", "l": b'[["any",[["t","evil",null,[3]]]]]', "r": b'[0,["p"],0,1,3]'},
    {"w": b"a", "l": b"[]", "r": b"[" * 100_000},
    {"w": b"a", "l": b"{}", "r": b"{}"},
    {"w": b"a", "l": b"\xff\xfe", "r": b"\xff"},
    {"w": b"a", "l": b"[" * 100_000, "r": b"[]"},
    {"w": b"a", "l": b'[["s",[["x",["float32"],null,[1]]]]]', "r": b"[]"},
    {"w": b"a", "l": b'[["s",[["x","float32",{},[1]]]]]', "r": b"[]"},
    {"w": b"a", "l": b'[["s",[["x","float32",null,[1]]]]]', "r": b'[0,["p"],0,1,' + b"9" * 5000 + b"]"},
    {"w": b"a", "l": b'[["s",[["x","float32",null,[1]]]]]', "r": b'[0,["p"],0,1,' + b"9" * 20 + b"]"},
    {"w": b"a", "l": b"[]", "r": b" " * (9 << 20)},
]


@pytest.mark.parametrize("fields", GARBAGE, ids=range(len(GARBAGE)))
def test_what_no_writer_added_is_refused(service: RedisService, fields: dict[str, bytes]) -> None:
    channel = service.channel(fresh_run())
    writer, reader = channel.writer("capture-0"), channel.reader()
    writer.publish([make_ref(0)])
    stream = f"{reader._connection.base}:refs"
    number = service.client().xadd(stream, fields)
    assert reader.poll(10, 5.0) == [make_ref(0)], "what came before is good"
    for _ in range(2):
        with pytest.raises(ChannelError, match="was not written by a writer of refs"):
            reader.poll(10, 0.1)
    with pytest.raises(ChannelError, match="was not written by a writer of refs"):
        writer.published()
    reader.close()
    service.client().xdel(stream, number)
    later = channel.reader()
    assert later.poll(10, 5.0) == [make_ref(0)]
    writer.close()
    later.close()


def test_a_batch_that_no_desk_offered_is_refused(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    desk = channel.leases()
    desk.offer([batch(0)])
    service.client().hset(f"{desk._connection.base}:batches", "evil", "7 0 {}")
    with pytest.raises(ChannelError, match="not written by a desk"):
        desk.outstanding()
    desk.close()


KEYS = ("meta", "refs", "writers", "open", "sealed", "failed", "alive", "acked", "batches", "waiting", "held")
PLANTS: list[tuple[str, str, Callable[[Any, str], object]]] = [
    *((key, "a text", lambda client, name: client.set(name, "x")) for key in KEYS),
    *((key, "a list", lambda client, name: client.rpush(name, "x")) for key in KEYS),
    *(
        ("meta", f"{field}={value[:8]!r}", lambda client, name, f=field, v=value: client.hset(name, f, v))
        for field in ("refs", "bytes", "failures", "reader_failure", "returned", "offered", "taken", "step")
        for value in (b"garbage", b"", b"-5", b"1.5", b"1e30", b"9" * 30, b"9" * 5000, b"\xff")
    ),
    *(
        (key, f"{field}={value[:12]!r}", lambda client, name, f=field, v=value: client.hset(name, f, v))
        for key, field in (
            ("writers", "capture-0"),
            ("failed", "capture-0"),
            ("acked", "1-0"),
            ("batches", "train.0.0+4"),
            ("held", "train.0.0+4"),
        )
        for value in (
            b"",
            b"garbage",
            b"1 2",
            b"1 2 3",
            b"-1 -2 -3",
            b"1 1 {}",
            b"1 1 []",
            b"1 1 " + b"[" * 100_000,
            b"1 1 " + b"9" * 5000,
            b"9" * 5000 + b" 1 x y",
            b"\xff\xfe \xff",
            b'1 1 {"split":"train","epoch":0,"first":0,"count":1000000000000000000,"wanted":[],"fingerprint":""}',
            b'1 1 {"split":"train","epoch":0,"first":0,"count":4,"wanted":[9],"fingerprint":""}',
        )
    ),
    ("waiting", "inf", lambda client, name: client.zadd(name, {"no such batch": float("-inf")})),
    ("alive", "inf", lambda client, name: client.zadd(name, {"w:capture-0": float("inf"), "r:x": float("inf")})),
]


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    with redis_service(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.mark.parametrize(("key", "what", "plant"), PLANTS, ids=[f"{key}: {what}" for key, what, _ in PLANTS])
@pytest.mark.parametrize("early", [True, False], ids=["before", "meanwhile"])
def test_what_strangers_keep_under_a_runs_keys_is_an_error_or_harmless(
    shared_service: RedisService, key: str, what: str, plant: Callable[[Any, str], object], early: bool
) -> None:
    """Every call ends, at once, with its result or with an error that names the server and the run's keys."""
    service = shared_service
    channel = service.channel(fresh_run(), lease_seconds=2.0)
    name = f"{channel._base}:{key}"
    client = service.client()
    errors: list[str] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ChannelError as error:
            errors.append(str(error))
            return None

    if early:
        plant(client, name)
    writer, reader, desk = attempt(lambda: channel.writer("capture-0")), attempt(channel.reader), channel.leases()
    attempt(lambda: desk.offer([batch(0)]))
    attempt(lambda: writer and writer.publish([make_ref(0), make_ref(1)]))
    attempt(lambda: reader and reader.poll(1, 0.0))
    if not early:
        if what in ("a text", "a list"):
            client.delete(name)
        plant(client, name)
    lease = attempt(lambda: desk.take("capture-0", 0.0))
    for call in (
        lambda: writer and writer.publish([make_ref(2)]),
        lambda: writer and writer.in_flight(),
        lambda: writer and writer.published(),
        lambda: reader and reader.poll(10, 0.0),
        lambda: reader and reader.ack([make_ref(0).sample_id, make_ref(1).sample_id], step=1),
        lambda: reader and reader.drained,
        lambda: lease and desk.finish(lease),
        lambda: desk.take("capture-0", 0.0),
        desk.outstanding,
        lambda: channel.seal(),
        lambda: desk.end("the test is over"),
        lambda: writer and writer.close(),
        lambda: reader and reader.close(),
        lambda: channel.reader().close(),
    ):
        attempt(call)
    desk.close()
    assert all(channel._base in error for error in errors), errors


def test_a_wrong_password_is_denied_and_never_shown(tmp_path: Path) -> None:
    with redis_service(tmp_path / "redis", password="right-secret") as service:
        for login in (":wrong-secret@", "", "user:wrong-secret@"):
            channel = service.channel(fresh_run(), url=f"redis://{login}127.0.0.1:{service.port}/0")
            with pytest.raises(AccessDenied) as raised:
                channel.reader()
            assert "secret" not in str(raised.value)
        channel = service.channel(fresh_run(), reconnect_seconds=0.5)
        channel.reader().close()
        service.kill()
        with pytest.raises(ChannelError) as raised:
            channel.leases().outstanding()
        assert "secret" not in str(raised.value)
        assert "secret" not in repr(service.section())
        assert "secret" not in str(service.section().model_dump())
        service.restart()


def test_another_token_or_none_is_denied(service: RedisService) -> None:
    run = fresh_run()
    service.channel(run, token="ours").reader().close()
    for token in ("theirs", None):
        for attach in (lambda c: c.reader(), lambda c: c.writer("a"), lambda c: c.leases().outstanding()):
            with pytest.raises(AccessDenied, match="token"):
                attach(service.channel(run, token=token))
    assert b"ours" not in b"".join(service.client().hgetall("specforge:{" + run + "}:meta").values())
    service.channel(fresh_run(), token="theirs").reader().close()


def test_tls_with_a_certificate_that_is_trusted_and_without(tmp_path: Path) -> None:
    with redis_service(tmp_path / "redis", tls=True) as service:
        channel = service.channel(fresh_run(), url=f"{service.tls_url}?ssl_ca_certs={service.certificate}")
        writer, reader = channel.writer("capture-0"), channel.reader()
        writer.publish([make_ref(0)])
        assert reader.poll(1, 5.0) == [make_ref(0)]
        writer.close()
        reader.close()
        with pytest.raises(ChannelError, match="no secure connection"):
            service.channel(fresh_run(), url=service.tls_url).reader()
        plain = f"rediss://127.0.0.1:{service.port}/0"
        with pytest.raises(ChannelError, match="only where, it speaks TLS"):
            service.channel(fresh_run(), url=plain, reconnect_seconds=1.0).reader()


def test_a_unix_socket_serves_as_well(service: RedisService) -> None:
    channel = service.channel(fresh_run(), url=f"unix://{service.socket}?db=1")
    reader = channel.reader()
    assert reader.poll(1, 0.0) == []
    reader.close()


@pytest.mark.parametrize(
    "url", ["http://host", "redis://", "redis://u:p@[::1", "unix://", "redis://host:0", "redis://host?nonsense=1"]
)
def test_an_unusable_url_is_refused_without_being_shown(service: RedisService, url: str) -> None:
    with pytest.raises((ValueError, ChannelError)):
        service.channel(fresh_run(), url=url).reader()


def test_a_stream_is_no_longer_than_what_is_in_flight(service: RedisService) -> None:
    channel = service.channel(fresh_run())
    writer, reader = channel.writer("capture-0"), channel.reader()
    client = service.client()
    for round_ in range(30):
        writer.publish([make_ref(100 * round_ + number) for number in range(40)])
        refs = reader.poll(40, 5.0)
        reader.ack([ref.sample_id for ref in refs], step=round_)
    base = reader._connection.base
    assert client.xlen(f"{base}:refs") == 0
    assert client.xpending(f"{base}:refs", "reader")["pending"] == 0
    assert not client.exists(f"{base}:acked")
    assert sum(client.memory_usage(key) for key in client.scan_iter(f"{base}*")) < 10_000
    writer.close()
    reader.close()
