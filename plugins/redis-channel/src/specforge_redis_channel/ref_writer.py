# SPDX-License-Identifier: Apache-2.0
"""The capture side: adds batches of refs to the stream, each whole and once."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from specforge_core.contracts import ChannelError, ChannelFailed, InFlight, PeerDied, RefWriter, SampleRef

from specforge_redis_channel.connection import REFS, RedisConnection, plain, text
from specforge_redis_channel.entries import EntryDecoder, EntryEncoder
from specforge_redis_channel.heart import Heart, Member
from specforge_redis_channel.membership import take_place
from specforge_redis_channel.stream import acked_bits, unacked

CLOSE_SECONDS = 5.0


class RedisRefWriter(RefWriter):
    """Thread-safe. Batches are numbered, so that one that was sent again after a lost reply is not added twice."""

    def __init__(self, name: str, connection: RedisConnection, *, heart: Heart) -> None:
        """:raises ChannelError: a process that lives writes under this name."""
        self._name = plain(name)
        self._connection = connection
        self._heart = heart
        self._lock = threading.Lock()
        self._session = secrets.token_hex(8)
        self._encoder = EntryEncoder()
        self._sequence = 0
        self._reader_known = False
        self._ended = False
        found = take_place(
            connection,
            lambda: connection.run(REFS, "open_writer", self._name, self._session),
            what=f"another process writes as {name}",
        )
        self._since = connection.count(found[0], "meta")
        """How many failures there were; only later ones are told here."""
        self._former_reader = found[1]
        self._member: Member = ("w", name, self._session)
        heart.join(self, self._member)

    def publish(self, refs: Sequence[SampleRef]) -> None:
        nbytes = sum(ref.nbytes for ref in refs)
        with self._lock:
            self._refuse_ended()
            try:
                fields = self._encoder.encode(refs)
            except ValueError as error:
                raise ChannelError(str(error), where=self._connection.where) from error
            # Counted before it is sent: a batch that may have arrived must not lend its number to the next.
            self._sequence += 1
            self._ask("publish", self._since, self._sequence, len(refs), nbytes, *fields)

    def in_flight(self) -> InFlight:
        with self._lock:
            self._refuse_ended()
            refs, nbytes, state, reader = self._ask("in_flight", self._since)
            self._raise_if_reader_died(state, reader)
            return InFlight(self._connection.count(refs, "meta"), self._connection.count(nbytes, "meta"))

    def published(self) -> list[SampleRef]:
        with self._lock:
            self._refuse_ended()
            decoder = EntryDecoder(self._connection.where)
            return self._connection.call(lambda: unacked(self._connection, decoder, acked_bits(self._connection)))

    def close(self) -> None:
        """:raises ChannelError: the server could not be told within some seconds."""
        self._end("closed", "")

    def fail(self, reason: str) -> None:
        with suppress(ChannelError):  # this writer's heartbeat ends, which says the same without the reason
            self._end("failed", reason)

    def _end(self, how: str, reason: str) -> None:
        self._connection.interrupt()
        with self._lock:
            self._connection.resume()
            if self._ended:
                return
            self._ended = True
            self._heart.leave(self._member)
            try:
                self._connection.call(
                    lambda: self._connection.run(REFS, "end_writer", self._name, self._session, how, plain(reason)),
                    at_most=CLOSE_SECONDS,
                )
            finally:
                self._connection.close()

    def _ask(self, operation: str, *arguments: bytes | int) -> list[Any]:
        """:raises ChannelFailed: the reader failed since this writer was opened."""
        status, *found = self._connection.call(
            lambda: self._connection.run(REFS, operation, self._name, self._session, *arguments)
        )
        if status == b"replaced":
            raise ChannelError(
                f"another process writes as {text(self._name)} now",
                where=self._connection.where,
                hint="this process was taken for dead; end it",
            )
        if status == b"failed":
            raise ChannelFailed(text(found[0]), where=f"{self._connection.where}, reader")
        return found

    def _raise_if_reader_died(self, state: bytes, reader: bytes) -> None:
        """A server that lost everything knows of no reader; one that lives tells it within a heartbeat."""
        dead = state == b"dead" and reader != self._former_reader
        lost = state == b"none" and self._reader_known and self._connection.settled
        if dead or lost:
            raise PeerDied(
                "the reading process died: nothing was heard of it for a whole lease",
                where=self._connection.where,
                hint="see its log, then run it again",
            )
        if state != b"none":
            self._reader_known = state == b"alive"

    def _refuse_ended(self) -> None:
        if self._ended:
            raise ChannelError("this writer was closed", where=f"{self._connection.where}, writer {text(self._name)}")
