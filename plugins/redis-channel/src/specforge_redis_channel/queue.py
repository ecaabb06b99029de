# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work on a Redis server that all processes of a run reach.

The server keeps the book (``queue.lua``): each call is one script, whole or not at all. Results carry the refs of a
batch as records of a ``RefEncoder`` of their own. Members show life by a heartbeat on the server's clock. A call whose
reply was lost is made again under the same request, and the server then repeats its answer.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, get_args
from urllib.parse import quote

from specforge_core import RefDecoder, RefEncoder
from specforge_core.contracts import CaptureBatch, ChannelError, PartContext, SampleRef, access_proof, read_batch
from specforge_core.contracts.capture_queue import (
    CaptureQueue,
    Ending,
    EndKind,
    Membership,
    NumberedLease,
    Result,
    Results,
    check_offer,
    check_refs,
)
from specforge_core.contracts.files import parse_json

from specforge_redis_channel.config import RedisChannelConfig
from specforge_redis_channel.connection import RedisConnection, Script, plain, text
from specforge_redis_channel.heart import Heart, Member
from specforge_redis_channel.membership import take_place

QUEUE = Script("queue")

_BATCHES_PER_CALL = 1000
"""A script of so many takes some milliseconds, during which the server answers nobody else."""
_MOST_BYTES = 8 << 20
"""Of one batch or result: a million offsets that are wanted, the most that a batch has, take some 7 MB."""
_LEAVE_SECONDS = 5.0  # a server that does not answer learns of it when the heartbeat ends
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05  # a look is one round trip; a batch takes tenths of a second


class RedisMembership(Membership):
    """A name in the queue, which the heartbeat of this process keeps."""

    def __init__(self, name: str, *, leave: Callable[[RedisMembership], None]) -> None:
        self.member: Member = ("m", name, secrets.token_hex(8))
        self.words = (plain(name), self.member[2])
        self._leave = leave

    @property
    def name(self) -> str:
        return self.member[1]

    def close(self) -> None:
        """:raises ChannelError: the server could not be told within some seconds; the heartbeat ends all the same."""
        self._leave(self)


class _HeartConnection(RedisConnection):
    """A heart's connection: its beats are those of queue members."""

    def run(self, script: Script, *arguments: str | bytes | int) -> list[Any]:
        return super().run(QUEUE if arguments[0] == "beat" else script, *arguments)


class RedisQueue(CaptureQueue):
    """Thread-safe. The run's keys begin with ``specforge:{run id}``."""

    def __init__(self, config: RedisChannelConfig, context: PartContext) -> None:
        base = "specforge:{" + quote(context.run_id, safe="", errors="surrogatepass") + "}"
        proof = access_proof(context.token, purpose=base) if context.token is not None else ""
        self._new_connection = partial(RedisConnection, config, base=base, proof=proof)
        self._connection = self._new_connection()
        beating = _HeartConnection(config, base=base, proof=proof)
        self._heart = Heart(beating, lease_seconds=config.lease_seconds)
        self._own: dict[str, RedisMembership] = {}
        self._lock = threading.Lock()
        self._closed = False

    def join(self, name: str) -> RedisMembership:
        """:raises ChannelError: no server, a name that is no text, or one that a living process has."""
        if not name or text(plain(name)) != name:
            raise ChannelError(f"a member needs a name that is text: {name[:80]!r}", where=self._connection.where)
        membership = RedisMembership(name, leave=self._leave)
        with closing(self._new_connection()) as connection:
            ask = partial(connection.run, QUEUE, "join", *membership.words)
            take_place(connection, ask, what=f"another process has joined as {name}")
        self._own[name] = membership
        self._heart.join(membership, membership.member)
        return membership

    def _leave(self, membership: RedisMembership) -> None:
        if self._own.get(membership.name) is not membership:
            return
        del self._own[membership.name]
        self._heart.leave(membership.member)
        # Over a connection of its own: another call may be waiting for the server on the queue's.
        with closing(self._new_connection()) as connection:
            tell = partial(connection.run, QUEUE, "leave", *membership.words)
            connection.call(tell, at_most=_LEAVE_SECONDS)

    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        """Many batches are offered in parts, which others see one after the other.

        :raises ValueError: a batch or a number that no reader would take.
        """
        check_offer(batches, above)
        words = _batch_words(batches)
        session = b""
        for first in range(0, max(len(words), 1), 2 * _BATCHES_PER_CALL):
            part = words[first : first + 2 * _BATCHES_PER_CALL]
            session = self._ask("offer", secrets.token_hex(8), session, above, *part)[1]

    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        if worker not in self._own:
            raise ChannelError(f"{worker} has not joined here", where=self._connection.where)
        words = (*self._own[worker].words, secrets.token_hex(8))
        for _ in _turns(timeout):
            status, *found = self._ask("take", *words)
            if status == b"lease":
                return self._lease(worker, found)
            if status == b"replaced":
                what, hint = f"another process has joined as {worker}", "this process was taken for dead; end it"
                raise ChannelError(what, where=self._connection.where, hint=hint)
            if status == b"ended":
                break
        return None

    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        """:raises ChannelError: a ref that cannot be recorded, more refs than one result takes, or no room."""
        check_refs(lease, refs)
        try:
            layouts, record = RefEncoder().encode_batch(refs) if refs else ([], [])
            result = _json([lease.worker, _fields(lease.batch), layouts, record, signature])
            if len(result) > _MOST_BYTES:
                raise ValueError(f"refs of {len(result)} bytes, above {_MOST_BYTES}: give prompts ids that are shorter")
        except ValueError as error:
            raise ChannelError(f"{lease.batch.key}: {error}", where=self._connection.where) from error
        key, worker = plain(lease.batch.key), plain(lease.worker)
        return bool(self._ask("finish", key, lease.number, worker, secrets.token_hex(8), result) == [b"ok"])

    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        check_offer(instead, 0)
        words = _batch_words(instead)
        self._ask("give_back", plain(lease.batch.key), lease.number, plain(lease.worker), *words)

    def outstanding(self) -> Sequence[CaptureBatch]:
        [_, found] = self._ask("outstanding")
        with self._reading("entries"):
            entries = [(*entry.split(b" ", 2), key) for key, entry in zip(found[::2], found[1::2], strict=True)]
            offered = sorted(entries, key=lambda entry: int(entry[0]))
            return [_read_batch(key, _parse(content)) for _, _, content, key in offered]

    def results(self, after: int, timeout: float) -> Results:
        for _ in _turns(timeout):
            seen = self._look(after)
            if seen.results or seen.ending is not None:
                break
        return seen

    def commit(self, position: int) -> None:
        self._ask("commit", position)

    def end(self, ending: Ending) -> bool:
        content = _json([*asdict(ending).values()])
        return bool(self._ask("end", ending.session, secrets.token_hex(8), content) == [b"ok"])

    def close(self) -> None:
        """The members of this process leave.

        :raises ChannelError: the server could not be told within some seconds.
        """
        with ExitStack() as last:
            last.callback(self._close_connection)
            for membership in list(self._own.values()):
                last.callback(membership.close)

    def _close_connection(self) -> None:
        self._connection.interrupt()
        with self._lock:
            self._closed = True
            self._connection.close()

    def _ask(self, operation: str, *arguments: str | bytes | int) -> list[Any]:
        with self._lock:
            if self._closed:
                raise ChannelError("this queue was closed", where=self._connection.where)
            return self._connection.call(lambda: self._connection.run(QUEUE, operation, *arguments))

    def _look(self, after: int) -> Results:
        witness = next(iter(list(self._own)), "")
        [_, first, records, alive, session, ending, count, known] = self._ask(
            "results", after, plain(witness), secrets.token_hex(8)
        )
        with self._reading("alive"):
            members = frozenset(member.decode()[2:] for member in alive if member.startswith(b"m:"))
        with self._reading("queue"):
            ended = _read_ending(ending, int(session)) if ending else None
            own = known.decode("ascii")
        with self._reading("results"):
            results = [self._result(int(first) + index, record) for index, record in enumerate(records)]
        return Results(
            identity=own, results=results, members=members, session=int(session), ending=ended, outstanding=int(count)
        )

    def _lease(self, worker: str, found: Sequence[bytes]) -> NumberedLease:
        key, content, *numbers = found
        with self._reading("entries"):
            number, attempt, session = map(int, numbers)
            batch = _read_batch(key, _parse(content))
            return NumberedLease(batch=batch, worker=worker, number=number, attempt=attempt, session=session)

    def _result(self, position: int, record: bytes) -> Result:
        """:raises ValueError: no queue was given this for a result."""
        place, number, key, content = record.split(b" ", 3)
        worker, fields, layouts, refs, signature = _parse(content)
        if int(place) != position or {type(worker), type(signature)} != {str}:
            raise ValueError(f"not the result at position {position}")
        return Result(
            position=position,
            batch=_read_batch(key, fields),
            number=self._connection.count(number, "results"),
            worker=worker,
            refs=_read_refs(layouts, refs, origin=f"{self._connection.where}:results, position {position}"),
            signature=signature,
        )

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """A value that no queue put there is an error that names the key."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise self._connection.damaged(f"{self._connection.base}:{key}") from error


def _turns(timeout: float) -> Iterator[None]:
    """Turns of a wait, with growing pauses between them; the last one is at the deadline."""
    deadline, pause = time.monotonic() + timeout, _SHORTEST_PAUSE
    while True:
        yield
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _batch_words(batches: Sequence[CaptureBatch]) -> list[bytes]:
    """Key and content of every batch."""
    return [word for batch in batches for word in (plain(batch.key), _json(_fields(batch)))]


def _fields(batch: CaptureBatch) -> dict[str, Any]:
    return asdict(batch) | {"wanted": list(batch.wanted)}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _parse(content: bytes) -> Any:
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return parse_json(content)


def _read_batch(key: bytes, fields: Any) -> CaptureBatch:
    batch = read_batch(fields if type(fields) is dict else {})
    if plain(batch.key) != key:
        raise ValueError(f"{batch.key} under another batch's key")
    return batch


def _read_refs(layouts: Any, record: Any, *, origin: str) -> list[SampleRef]:
    if layouts == [] and record == []:
        return []
    decoder = RefDecoder()
    for layout in layouts if type(layouts) is list else [None]:
        decoder.add_layout(layout)
    return decoder.decode_batch(record, origin=origin)


def _read_ending(content: bytes, session: int) -> Ending:
    kind, number, by, what, where, hint = _parse(content)
    if kind not in get_args(EndKind) or number != session or {*map(type, (by, what, where, hint))} != {str}:
        raise ValueError("not how this session ended")
    return Ending(kind=kind, session=session, by=by, what=what, where=where, hint=hint)
