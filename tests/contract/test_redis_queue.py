# SPDX-License-Identifier: Apache-2.0
"""The contract of the queue of capture work on a real Redis server: the same book, whatever reply is lost."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis_service import RedisService, fresh_run, redis_service, wait_until
from specforge_core.channel.queue_book import QueueBook
from specforge_core.contracts import AccessDenied, CaptureBatch, ChannelError, PartContext
from specforge_core.contracts.capture_queue import CaptureQueue, Ending, Membership, NumberedLease
from specforge_core.testing.capture_queue_suite import DurableQueueSuite
from specforge_core.testing.queue_under_test import make_batch, make_refs
from specforge_redis_channel.queue import QUEUE, RedisMembership, RedisQueue

STEPS = 2000
WORKERS = ("a", "b", "worker c")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisService]:
    with redis_service(tmp_path_factory.mktemp("redis")) as running:
        yield running


def open_queue(service: RedisService, run_id: str, *, token: str | None = None, **settings: Any) -> RedisQueue:
    return RedisQueue(service.section(**settings), PartContext(run_id=run_id, directory=Path(), token=token))


def vanish(queue: CaptureQueue, member: Membership) -> None:
    """End a member as the death of its process would: no heartbeat any more, not a word."""
    assert isinstance(queue, RedisQueue)
    assert isinstance(member, RedisMembership)
    queue._heart.leave(member.member)
    del queue._own[member.name]


def judging(queue: RedisQueue) -> RedisQueue:
    """Of a connection that has lasted for so long that it may judge who is dead."""
    queue.outstanding()
    queue._connection._since = float("-inf")
    return queue


class TestRedisQueue(DurableQueueSuite):
    @pytest.fixture(autouse=True)
    def _with_server(self, service: RedisService) -> None:
        self.service = service

    def make_queue(self, directory: Path) -> CaptureQueue:
        return open_queue(self.service, f"run {directory}")

    def kill_member(self, queue: CaptureQueue, member: Membership) -> None:
        vanish(queue, member)


class Players:
    """The same steps for the pure book and for the server's, through queues that never beat while they play."""

    def __init__(self, service: RedisService, choice: random.Random) -> None:
        self.choice = choice
        self.book = QueueBook[str]()
        run = fresh_run()
        self.queues = [open_queue(service, run, lease_seconds=3600.0) for _ in range(2)]
        self.alive = f"specforge:{{{run}}}:alive"
        self.client = service.client()
        self.members = {name: self.queue().join(name) for name in WORKERS}
        self.leases: list[NumberedLease] = []
        for queue in self.queues:
            judging(queue)

    def queue(self) -> RedisQueue:
        return self.choice.choice(self.queues)

    def home(self, name: str) -> RedisQueue:
        """The queue through which a member joined."""
        [queue] = [queue for queue in self.queues if name in queue._own]
        return queue

    def batches(self, most: int) -> list[CaptureBatch]:
        return [make_batch(self.choice.randrange(30)) for _ in range(self.choice.randint(0, most))]

    def offer(self) -> None:
        batches, above = self.batches(6), self.choice.choice((0, 0, self.book.number + self.choice.randint(-5, 5)))
        self.queue().offer(batches, above=max(above, 0))
        self.book.offer(batches, above=max(above, 0))

    def take(self) -> None:
        name = self.choice.choice(WORKERS)
        lease = self.home(name).take(name, 0.0)
        assert lease == self.book.take(name)
        self.leases += [lease] if lease else []

    def finish(self) -> None:
        lease = self.lease()
        found = self.queue().finish(lease, make_refs(lease), signature=str(lease.number))
        assert found == (self.book.finish(lease, str(lease.number)) is not None)

    def give_back(self) -> None:
        lease, instead = self.lease(), self.choice.choice(([], self.batches(3)))
        self.queue().give_back(lease, instead=instead)
        self.book.give_back(lease, instead=instead)

    def leave(self) -> None:
        name = self.choice.choice(WORKERS)
        self.members[name].close()
        self.book.drop(name)
        self.join(name)

    def die(self) -> None:
        name = self.choice.choice(WORKERS)
        vanish(self.home(name), self.members[name])
        self.client.zadd(self.alive, {f"m:{name}": 1})
        if self.choice.random() < 0.5:
            assert self.queue().results(0, 0.0).members == {*WORKERS} - {name}
        self.book.drop(name)
        self.join(name)

    def commit(self) -> None:
        position = self.book.committed + self.choice.randint(-1, 4)
        self.queue().commit(position)
        self.book.commit(position)

    def end(self) -> None:
        session = self.book.session + self.choice.choice((0, 0, -1, 1))
        ending = Ending(kind="failed", session=session, by="train", what="no room: \u00e9\n", where="disk", hint="none")
        assert self.queue().end(ending) == self.book.end(ending)

    def compare(self) -> None:
        assert list(self.queue().outstanding()) == self.book.outstanding()
        after = self.book.committed + self.choice.randint(-2, 3)
        seen = self.queue().results(after, 0.0)
        expected = self.book.results(after)[: len(seen.results)]
        assert len(expected) == len(seen.results) > 0 or not self.book.results(after)
        for result, finished in zip(seen.results, expected, strict=True):
            lease = finished.lease
            found = (result.position, result.batch, result.number, result.worker, result.signature)
            assert found == (finished.position, lease.batch, lease.number, lease.worker, finished.payload)
            assert list(result.refs) == make_refs(lease)
        assert (seen.session, seen.ending) == (self.book.session, self.book.ending)
        assert (seen.outstanding, seen.members) == (len(self.book.outstanding()), frozenset(WORKERS))

    def lease(self) -> NumberedLease:
        """One that may long be lost."""
        return self.choice.choice(self.leases[-8:])

    def join(self, name: str) -> None:
        self.members[name] = self.queue().join(name)

    def close(self) -> None:
        for queue in self.queues:
            queue.close()


@pytest.mark.parametrize(("seed", "ordered"), [(1, 128), (2, 0)])
def test_the_server_says_what_the_book_says(service: RedisService, seed: int, ordered: int) -> None:
    """``ordered``: up to how many fields a hash of the server happens to keep the order of."""
    service.client().config_set("hash-max-listpack-entries", ordered)
    choice = random.Random(seed)
    with closing(Players(service, choice)) as players:
        common = [players.take] * 40 + [players.finish] * 25 + [players.offer] * 20 + [players.give_back] * 8
        rare = [players.commit] * 8 + [players.compare] * 10 + [players.leave, players.die, players.end]
        for number in range(STEPS):
            step = choice.choice(common + rare)
            if players.leases or step not in (players.finish, players.give_back):
                step()
            if number % 20 == 0:
                players.compare()
        assert players.book.number > STEPS // 8
        assert players.book.session > 3
        assert players.book.position > STEPS // 16


class Gateway:
    """Passes everything on to the server, but for the reply to one call, whose connection it cuts instead."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.lost = 0
        self._word = b""
        self._then: Callable[[], object] = lambda: None
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_reply(self, word: str, then: Callable[[], object] = lambda: None) -> None:
        """Of the next call of that operation; ``then`` happens after it was carried out, before it is tried again."""
        self._then = then
        self._word = f"\r\n{word}\r\n".encode()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._server))
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        """A call has one reply, so they take turns; either may come in pieces."""
        request = b""
        with client, server, suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [], 60)[0]:
                    piece = ready.recv(1 << 20)
                    if not piece:
                        return
                    if ready is client:
                        request += piece
                        server.sendall(piece)
                        continue
                    if self._word and self._word in request:
                        self._word = b""
                        self.lost += 1
                        self._then()
                        return
                    request = b""
                    client.sendall(piece)

    def close(self) -> None:
        self._listening.close()


class Pair:
    """A queue whose replies can be lost, and the same queue as somebody else has it."""

    def __init__(self, service: RedisService) -> None:
        run = fresh_run()
        self.gateway = Gateway(service.port)
        self.other = open_queue(service, run, lease_seconds=20.0)
        self.queue = open_queue(service, run, lease_seconds=20.0, url=f"redis://127.0.0.1:{self.gateway.port}/0")
        self.member = self.queue.join("capture-0")

    def take(self) -> NumberedLease:
        lease = self.queue.take(self.member.name, 0.0)
        assert lease is not None
        return lease

    def positions(self) -> Sequence[int]:
        return [result.position for result in self.other.results(0, 0.0).results]

    def close(self) -> None:
        self.queue.close()
        self.other.close()
        self.gateway.close()


@pytest.fixture
def pair(service: RedisService) -> Iterator[Pair]:
    with closing(Pair(service)) as opened:
        yield opened
        assert opened.gateway.lost == 1


@pytest.mark.parametrize("committed", [False, True], ids=["and stays", "and is committed meanwhile"])
def test_a_finish_whose_reply_is_lost_is_one_finish(pair: Pair, committed: bool) -> None:
    pair.queue.offer([make_batch(0), make_batch(1)])
    lease = pair.take()
    pair.gateway.lose_reply("finish", lambda: pair.other.commit(1) if committed else None)
    assert pair.queue.finish(lease, make_refs(lease))
    assert not pair.queue.finish(lease, make_refs(lease)), "another call with the same lease"
    assert pair.positions() == ([] if committed else [1])
    second = pair.take()
    assert pair.queue.finish(second, make_refs(second))
    assert pair.positions()[-1] == 2


def test_a_finish_that_was_lost_stays_lost_when_its_reply_is(pair: Pair) -> None:
    pair.queue.offer([make_batch(0)])
    lost = pair.take()
    pair.queue.give_back(lost)
    held = pair.take()
    pair.gateway.lose_reply("finish")
    assert not pair.queue.finish(lost, make_refs(lost))
    assert pair.queue.finish(held, make_refs(held))


def test_a_take_whose_reply_is_lost_gives_its_lease(pair: Pair) -> None:
    pair.queue.offer([make_batch(0), make_batch(1)])
    pair.gateway.lose_reply("take")
    assert (pair.take().number, pair.take().number) == (1, 2)


def test_a_take_whose_reply_and_lease_are_lost_takes_anew(pair: Pair) -> None:
    pair.queue.offer([make_batch(0), make_batch(1)])
    first = NumberedLease(batch=make_batch(0), worker=pair.member.name, number=1, attempt=1, session=1)
    pair.gateway.lose_reply("take", lambda: pair.other.give_back(first))
    assert (pair.take().number, pair.take().number) == (2, 3)


def test_an_offer_whose_reply_is_lost_is_one_offer(pair: Pair) -> None:
    def capture_it_all_and_end() -> None:
        other = pair.other.join("capture-1")
        lease = pair.other.take("capture-1", 0.0)
        assert lease is not None
        assert pair.other.finish(lease, [])
        pair.other.commit(1)
        assert pair.other.end(Ending(kind="finished", session=1))
        other.close()

    pair.gateway.lose_reply("offer", capture_it_all_and_end)
    pair.queue.offer([make_batch(0)])
    assert pair.queue.outstanding() == []
    assert pair.queue.results(1, 0.0).ending is not None


def test_an_end_whose_reply_is_lost_is_one_end(pair: Pair) -> None:
    pair.queue.offer([make_batch(0)])
    pair.gateway.lose_reply("end", lambda: pair.other.offer([make_batch(1)]))
    assert pair.queue.end(Ending(kind="stopped", session=1))
    assert (pair.other.results(0, 0.0).session, pair.other.outstanding()) == (2, [make_batch(1)])


@pytest.mark.parametrize("word", ["join", "leave", "give_back", "commit"])
def test_other_calls_whose_reply_is_lost_change_nothing_more(pair: Pair, word: str) -> None:
    pair.queue.offer([make_batch(0), make_batch(1)])
    lease = pair.take()
    assert pair.queue.finish(lease, [])
    lease = pair.take()
    pair.gateway.lose_reply(word)
    second = pair.queue.join("capture-1")
    pair.queue.give_back(lease)
    pair.queue.commit(1)
    second.close()
    again = pair.take()
    assert (again.number, again.attempt) == (3, 1)
    assert pair.other.results(0, 0.0).members == {"capture-0"}


def test_a_killed_server_with_its_log_finishes_each_batch_once(tmp_path: Path) -> None:
    count, run = 150, fresh_run()

    def work(service: RedisService, name: str) -> int:
        finished = 0
        with closing(open_queue(service, run, lease_seconds=5.0)) as queue:
            queue.join(name)
            while (lease := queue.take(name, 60.0)) is not None:
                time.sleep(0.005)
                finished += queue.finish(lease, make_refs(lease))
        return finished

    with (
        redis_service(tmp_path / "redis", appendonly=True) as service,
        ThreadPoolExecutor(3) as threads,
        closing(open_queue(service, run, lease_seconds=5.0)) as queue,
    ):
        queue.offer([make_batch(number) for number in range(count)])
        working = [threads.submit(work, service, f"capture-{number}") for number in range(3)]
        for _ in range(3):
            time.sleep(0.2)
            service.kill()
            service.restart()
        wait_until(lambda: queue.results(0, 0.0).outstanding == 0)
        assert queue.end(Ending(kind="finished", session=1))
        assert sum(future.result(30.0) for future in working) == count
        found = queue.results(0, 0.0).results
        assert [result.position for result in found] == list(range(1, count + 1))
        assert {result.batch.first for result in found} == {4 * number for number in range(count)}


KEYS = ("queue", "members", "last", "entries", "returned", "offered", "leases", "results", "finished", "alive")
BATCH = make_batch(1).key
CONTENT = b'{"split":"train","epoch":0,"first":0,"count":4,"wanted":[],"fingerprint":""}'
PLANTS: Sequence[tuple[str, str, Callable[[Any, str], object]]] = [
    *((key, "a text", lambda client, name: (client.delete(name), client.set(name, "x"))) for key in KEYS),
    *(
        ("queue", f"{field}={value!r}", lambda client, name, f=field, v=value: client.hset(name, f, v))
        for field in ("number", "session", "position", "committed", "order", "ending")
        for value in (b"garbage", b"", b"-5", b"1.5", b"9" * 30, b'["finished",1,"","","",7]', b"\xff")
    ),
    *(
        (key, f"{value[:12]!r}", lambda client, name, k=key, v=value: client.hset(name, BATCH, v))
        for key in ("entries", "leases", "finished")
        for value in (
            b"",
            b"garbage",
            b"1 2",
            b"1 0 {}",
            b"1 0 []",
            b"1 0 " + b"[" * 100_000,
            b"9" * 5000 + b" x",
            b"\xff",
        )
    ),
    *(
        ("results", f"{value[:12]!r}", lambda client, name, v=value: client.lset(name, 0, v))
        for value in (
            b"",
            b"garbage",
            b"1 1 x []",
            b"2 1 train.0.0+4 []",
            b"1 1 train.0.0+4 " + b"[" * 100_000,
            b'1 1 train.0.0+4 ["a",{},[],[],""]',
            b'1 1 train.0.0+4 ["a",%s,1,[],""]' % CONTENT,
            b'1 1 train.0.0+4 ["a",%s,[],[],1]' % CONTENT,
            b'1 1 train.0.0+4 ["a",%s,[],[0,["p"],0,1,3],""]' % CONTENT,
            b'1 +1 train.0.0+4 ["a",%s,[],[],""]' % CONTENT,
            b"1 1 train.0.0+4 " + b" " * (9 << 20),
        )
    ),
    ("results", "one more", lambda client, name: client.rpush(name, "x")),
    ("results", "one less", lambda client, name: client.lpop(name)),
    ("offered", "no such batch", lambda client, name: client.lpush(name, "x")),
    ("returned", "no such batch", lambda client, name: client.lpush(name, "x")),
    ("alive", "no text", lambda client, name: client.zadd(name, {b"m:\xff": 1e15})),
    ("alive", "inf", lambda client, name: client.zadd(name, {"m:capture-0": float("inf")})),
]


@pytest.mark.parametrize(("key", "what", "plant"), PLANTS, ids=[f"{key}: {what}" for key, what, _ in PLANTS])
def test_what_strangers_keep_under_its_keys_is_an_error_or_harmless(
    service: RedisService, key: str, what: str, plant: Callable[[Any, str], object]
) -> None:
    """Every call ends, at once, with what it should say or with an error that names the run's keys."""
    run = fresh_run()
    base, client = f"specforge:{{{run}}}", service.client()
    with closing(open_queue(service, run, lease_seconds=5.0)) as queue:
        queue.join("capture-0")
        queue.offer([make_batch(number) for number in range(4)])
        first, second = queue.take("capture-0", 0.0), queue.take("capture-0", 0.0)
        assert first is not None
        assert second is not None
        assert queue.finish(first, make_refs(first))
        plant(client, f"{base}:{key}")
        errors = []
        for call in (
            lambda: queue.results(0, 0.0),
            lambda: queue.outstanding(),
            lambda: queue.take("capture-0", 0.0),
            lambda: queue.finish(second, make_refs(second)),
            lambda: queue.give_back(second),
            lambda: queue.offer([make_batch(7)]),
            lambda: queue.results(1, 0.0),
            lambda: queue.commit(2),
            lambda: queue.end(Ending(kind="finished", session=1)),
            lambda: queue.join("capture-1").close(),
        ):
            try:
                call()
            except ChannelError as error:
                errors.append(str(error))
        assert all(base in error for error in errors), errors
        named = [error for error in errors if f"{base}:{key}" in error]
        assert named or not errors or what == "a text", errors
        client.delete(*(f"{base}:{name}" for name in KEYS))


def test_a_long_offer_keeps_its_order(service: RedisService) -> None:
    with closing(open_queue(service, fresh_run())) as queue:
        batches = [make_batch(number) for number in range(12_500)]
        queue.offer(batches, above=40)
        assert list(queue.outstanding()) == batches
        queue.join("capture-0")
        lease = queue.take("capture-0", 0.0)
        assert lease is not None
        assert (lease.batch, lease.number) == (batches[0], 41)
        queue.give_back(lease, instead=[replace(make_batch(number), count=1) for number in range(9000)])
        assert len(queue.outstanding()) == 21_499


def test_a_member_that_stood_still_goes_on_without_what_it_held(service: RedisService) -> None:
    run = fresh_run()
    with closing(open_queue(service, run)) as queue, closing(open_queue(service, run)) as other:
        member = queue.join("capture-0")
        other.join("capture-1")
        queue.offer([make_batch(0), make_batch(1)])
        lost = queue.take("capture-0", 0.0)
        assert lost is not None
        queue._heart.leave(member.member)
        taken = [other.take("capture-1", 10.0), other.take("capture-1", 10.0)]
        assert [lease and (lease.batch.first, lease.attempt) for lease in taken] == [(4, 1), (0, 2)]
        assert other.results(0, 0.0).members == {"capture-1"}
        queue._heart.join(member, member.member)
        assert not queue.finish(lost, make_refs(lost))
        assert taken[0] is not None
        other.give_back(taken[0])
        again = queue.take("capture-0", 0.0)
        assert again is not None
        assert other.results(0, 0.0).members == {"capture-0", "capture-1"}


def test_a_server_that_stands_still_takes_nobody_for_dead(service: RedisService) -> None:
    run = fresh_run()
    with closing(open_queue(service, run)) as queue, closing(open_queue(service, run)) as other:
        queue.join("capture-0")
        other.join("capture-1")
        queue.offer([make_batch(0)])
        held = queue.take("capture-0", 0.0)
        assert held is not None
        time.sleep(1.2)
        service.stand_still()
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(other.take, "capture-1", 4.0)
            time.sleep(2.5)
            service.go_on()
            assert waiting.result(30.0) is None
        assert queue.finish(held, make_refs(held))


def test_nobody_is_judged_by_heartbeats_that_all_stood_still(service: RedisService) -> None:
    run = fresh_run()
    settings: dict[str, Any] = {"lease_seconds": 3600.0}
    with closing(open_queue(service, run, **settings)) as queue, closing(open_queue(service, run, **settings)) as other:
        queue.join("capture-0")
        other.join("capture-1")
        queue.offer([make_batch(0)])
        held = queue.take("capture-0", 0.0)
        assert held is not None
        for look in (lambda: other.take("capture-1", 0.0), lambda: other.results(0, 0.0).results or None):
            judging(other)
            service.client().zadd(f"specforge:{{{run}}}:alive", {"m:capture-0": 1, "m:capture-1": 1})
            assert look() is None
        assert queue.finish(held, make_refs(held))


def test_a_heartbeat_that_arrives_late_revives_nobody_who_left(service: RedisService) -> None:
    with closing(open_queue(service, fresh_run())) as queue:
        member = queue.join("capture-0")
        member.close()
        queue._connection.call(lambda: queue._connection.run(QUEUE, "beat", *member.member))
        assert queue.results(0, 0.0).members == frozenset()


def test_a_process_whose_name_was_taken_over_is_told(service: RedisService) -> None:
    run = fresh_run()
    with closing(open_queue(service, run)) as queue, closing(open_queue(service, run)) as other:
        queue.offer([make_batch(0), make_batch(1)])
        member = queue.join("capture-0")
        lost = queue.take("capture-0", 0.0)
        assert lost is not None
        queue._heart.leave(member.member)
        other.join("capture-0")
        queue._heart.join(member, member.member)
        with pytest.raises(ChannelError, match="another process has joined as capture-0"):
            queue.take("capture-0", 0.0)
        assert not queue.finish(lost, make_refs(lost))
        member.close()
        assert other.results(0, 0.0).members == {"capture-0"}
        again = other.take("capture-0", 0.0)
        assert again is not None
        assert (again.batch, again.attempt) == (make_batch(0), 2)


def test_a_full_server_refuses_a_finish_whole(tmp_path: Path) -> None:
    with redis_service(tmp_path / "redis") as service, closing(open_queue(service, fresh_run())) as queue:
        queue.join("capture-0")
        queue.offer([make_batch(0), make_batch(1)])
        first, second = queue.take("capture-0", 0.0), queue.take("capture-0", 0.0)
        assert first is not None
        assert second is not None
        assert queue.finish(first, make_refs(first))
        service.client().config_set("maxmemory", 100_000)
        with pytest.raises(ChannelError, match="raise maxmemory"):
            queue.finish(second, make_refs(second))
        with pytest.raises(ChannelError, match="raise maxmemory"):
            queue.offer([make_batch(2)])
        assert [result.position for result in queue.results(0, 0.0).results] == [1]
        queue.commit(1)
        queue.give_back(second)
        service.client().config_set("maxmemory", 0)
        again = queue.take("capture-0", 0.0)
        assert again is not None
        assert queue.finish(again, make_refs(again))


def test_another_token_is_denied(service: RedisService) -> None:
    run = fresh_run()
    with closing(open_queue(service, run, token="ours")) as queue:
        queue.offer([make_batch(0)])
    for token in ("theirs", None):
        with closing(open_queue(service, run, token=token)) as queue, pytest.raises(AccessDenied, match="token"):
            queue.outstanding()


def test_names_that_cannot_be_written_are_refused(service: RedisService) -> None:
    with closing(open_queue(service, fresh_run())) as queue:
        for name in ("", "\udc80"):
            with pytest.raises(ChannelError, match="name"):
                queue.join(name)
        assert queue.results(0, 0.0).session == 0
