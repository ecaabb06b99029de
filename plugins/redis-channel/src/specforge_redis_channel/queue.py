# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work on a Redis server that all processes of a run reach.

The server keeps the book (``queue.lua``): each call is one script, whole or not at all. Results carry the refs of a
batch as records of a ``RefEncoder`` of their own. Members show life by a heartbeat on the server's clock. A call whose
reply was lost is made again under the same request, and the server then repeats its answer.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, get_args
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
)
from specforge_core.contracts.files import parse_json

from specforge_redis_channel.connection import RedisConnection, Script, plain, text
from specforge_redis_channel.heart import Heart, Member
from specforge_redis_channel.membership import take_place

if TYPE_CHECKING:
    from specforge_redis_channel.config import RedisChannelConfig

QUEUE = Script("queue")

_BATCHES_PER_CALL = 1000
"""A script of so many takes some milliseconds, during which the server answers nobody else."""
_MOST_BYTES = 8 << 20
"""Of one batch or result: a million offsets that are wanted, the most that a batch has, take some 7 MB."""
_MOST_NUMBER = 2**53 - 1
"""The largest integer that the server's scripts count exactly."""
_LEAVE_SECONDS = 5.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05
_ENTRY = re.compile(rb"(\d{1,16}) \d{1,16} (.*)", re.DOTALL)
"""Order of the offer and content."""
_RESULT = re.compile(rb"(\d{1,16}) (\d{1,16}) (\S+) (.*)", re.DOTALL)
"""Position, number of the lease, key of the batch and content."""


class RedisMembership(Membership):
    """A name in the queue, which the heartbeat of this process keeps."""

    def __init__(self, name: str, session: str, *, leave: Callable[[RedisMembership, bool], None]) -> None:
        self.session = session
        self.member: Member = ("m", name, session)
        self._name = name
        self._leave = leave

    @property
    def name(self) -> str:
        return self._name

    def close(self) -> None:
        """:raises ChannelError: the server could not be told within some seconds; the heartbeat ends all the same."""
        self._leave(self, True)

    def abandon(self) -> None:
        """End the heartbeat without a word, as a death would."""
        self._leave(self, False)


class _HeartConnection(RedisConnection):
    """A heart's connection: its beats are those of queue members."""

    def run(self, script: Script, *arguments: str | bytes | int) -> list[Any]:
        return super().run(QUEUE if arguments[0] == "beat" else script, *arguments)


class RedisQueue(CaptureQueue):
    """Thread-safe. The run's keys begin with ``specforge:{run id}``."""

    def __init__(self, config: RedisChannelConfig, context: PartContext) -> None:
        base = "specforge:{" + quote(context.run_id, safe="", errors="surrogatepass") + "}"
        proof = access_proof(context.token, purpose=base) if context.token is not None else ""
        self._new_connection = lambda: RedisConnection(config, base=base, proof=proof)
        self._connection = self._new_connection()
        beating = _HeartConnection(config, base=base, proof=proof)
        self._heart = Heart(beating, lease_seconds=config.lease_seconds)
        self._own: dict[str, RedisMembership] = {}
        self._lock = threading.Lock()
        self._closed = False

    def join(self, name: str) -> RedisMembership:
        """:raises ChannelError: no server, a name that is no text, or one that a living process has."""
        where = f"{self._connection.where}, member {name[:80]!r}"
        if not name or text(plain(name)) != name:
            raise ChannelError("a member needs a name that is text in UTF-8", where=where)
        if name in self._own:
            raise ChannelError("this process has joined under that name already", where=where)
        membership = RedisMembership(name, secrets.token_hex(8), leave=self._leave)
        with closing(self._new_connection()) as connection:
            take_place(
                connection,
                lambda: connection.run(QUEUE, "join", plain(name), membership.session),
                what=f"another process has joined as {name}",
            )
        self._own[name] = membership
        self._heart.join(membership, membership.member)
        return membership

    def _leave(self, membership: RedisMembership, tell: bool) -> None:
        if self._own.get(membership.name) is not membership:
            return
        del self._own[membership.name]
        self._heart.leave(membership.member)
        if tell:  # over a connection of its own: another call may be waiting for the server on the queue's
            with closing(self._new_connection()) as connection:
                words = (plain(membership.name), membership.session)
                connection.call(lambda: connection.run(QUEUE, "leave", *words), at_most=_LEAVE_SECONDS)

    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        """Many batches are offered in parts, which others see one after the other.

        :raises ChannelError: a batch that no reader would take, or a number that the server cannot count to.
        """
        if not above <= _MOST_NUMBER:
            raise ChannelError(f"leases cannot be numbered above {above}", where=self._connection.where)
        words = self._batch_words(batches)
        session = b""
        for first in range(0, max(len(words), 1), 2 * _BATCHES_PER_CALL):
            part = words[first : first + 2 * _BATCHES_PER_CALL]
            [_, session] = self._ask("offer", _new_request(), session, above, *part)

    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        if worker not in self._own:
            raise ChannelError(f"{worker} has not joined here", where=self._connection.where)
        session, request = self._own[worker].session, _new_request()
        for _ in _turns(timeout):
            status, *found = self._ask("take", plain(worker), session, request)
            if status == b"lease":
                key, content, *numbers = found
                with self._reading("entries"):
                    batch = _read_batch(key, _parse(content))
                    number, attempt, now = map(int, numbers)
                return NumberedLease(batch=batch, worker=worker, number=number, attempt=attempt, session=now)
            if status == b"replaced":
                raise ChannelError(
                    f"another process has joined as {worker}",
                    where=self._connection.where,
                    hint="this process was taken for dead; end it",
                )
            if status == b"ended":
                return None
        return None

    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        """:raises ChannelError: a ref that cannot be recorded, more refs than one result takes, or no room."""
        try:
            layouts, record = RefEncoder().encode_batch(refs) if refs else ([], [])
        except ValueError as error:
            raise ChannelError(str(error), where=self._connection.where) from error
        result = _json([lease.worker, _fields(lease.batch), layouts, record, signature])
        if len(result) > _MOST_BYTES:
            raise ChannelError(
                f"the refs of {lease.batch.key} take {len(result)} bytes, above {_MOST_BYTES}",
                where=self._connection.where,
                hint="give prompts ids that are shorter",
            )
        [status] = self._ask("finish", *_words(lease), _new_request(), result)
        return bool(status == b"ok")

    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        self._ask("give_back", *_words(lease), *self._batch_words(instead))

    def outstanding(self) -> Sequence[CaptureBatch]:
        [_, found] = self._ask("outstanding")
        with self._reading("entries"):
            entries = [(*_match(_ENTRY, entry), key) for key, entry in zip(found[::2], found[1::2], strict=True)]
            return [_read_batch(key, _parse(content)) for order, content, key in sorted(entries, key=_order)]

    def results(self, after: int, timeout: float) -> Results:
        for _ in _turns(timeout):
            seen = self._look(after)
            if seen.results or seen.ending is not None:
                break
        return seen

    def commit(self, position: int) -> None:
        self._ask("commit", position)

    def end(self, ending: Ending) -> bool:
        [status] = self._ask("end", ending.session, _new_request(), _json([*asdict(ending).values()]))
        return bool(status == b"ok")

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
        [_, first, records, alive, session, ending, count] = self._ask("results", after, plain(witness))
        with self._reading("alive"):
            members = frozenset(member.decode()[2:] for member in alive if member.startswith(b"m:"))
        with self._reading("queue"):
            ended = _read_ending(ending, int(session)) if ending else None
        with self._reading("results"):
            results = [self._result(int(first) + index, record) for index, record in enumerate(records)]
        return Results(results=results, members=members, session=int(session), ending=ended, outstanding=int(count))

    def _result(self, position: int, record: bytes) -> Result:
        """:raises ValueError: no queue was given this for a result."""
        place, number, key, content = _match(_RESULT, record)
        worker, fields, layouts, refs, signature = _list(_parse(content), 5)
        if int(place) != position:
            raise ValueError(f"not the result at position {position}")
        return Result(
            position=position,
            batch=_read_batch(key, fields),
            number=int(number),
            worker=_text(worker),
            refs=_read_refs(layouts, refs, origin=f"{self._connection.where}:results, position {position}"),
            signature=_text(signature),
        )

    def _batch_words(self, batches: Sequence[CaptureBatch]) -> list[bytes]:
        """Key and content of every batch.

        :raises ChannelError: a batch that no reader would take.
        """
        try:
            return [
                word for batch in batches for word in (plain(read_batch(_fields(batch)).key), _json(_fields(batch)))
            ]
        except ValueError as error:
            raise ChannelError(f"a batch that cannot be offered: {error}", where=self._connection.where) from error

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        """A value that no queue put there is an error that names the key."""
        try:
            yield
        except ValueError as error:
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


def _new_request() -> str:
    """A name for all tries of one call."""
    return secrets.token_hex(8)


def _fields(batch: CaptureBatch) -> dict[str, Any]:
    return asdict(batch) | {"wanted": list(batch.wanted)}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _match(pattern: re.Pattern[bytes], record: bytes) -> tuple[bytes, ...]:
    found = pattern.fullmatch(record)
    if not found:
        raise ValueError("not a record of this kind")
    return found.groups()


def _order(entry: tuple[bytes, ...]) -> int:
    return int(entry[0])


def _parse(content: bytes) -> Any:
    if len(content) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    return parse_json(content)


def _list(value: Any, size: int) -> list[Any]:
    if type(value) is not list or len(value) != size:
        raise ValueError(f"not {size} fields")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text that is none")
    return value


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
    kind, number, *texts = _list(_parse(content), 6)
    if kind not in get_args(EndKind) or number != session:
        raise ValueError("not how this session ended")
    by, what, where, hint = map(_text, texts)
    return Ending(kind=kind, session=session, by=by, what=what, where=where, hint=hint)


def _words(lease: NumberedLease) -> tuple[bytes | int, ...]:
    return plain(lease.batch.key), lease.number, plain(lease.worker)
