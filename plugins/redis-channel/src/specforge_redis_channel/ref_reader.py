# SPDX-License-Identifier: Apache-2.0
"""The train side: takes entries from the stream through a consumer group and acks what was trained of them."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from specforge_core.contracts import ChannelError, ChannelFailed, PeerDied, RefReader, SampleRef

from specforge_redis_channel.connection import REFS, RedisConnection, plain, text
from specforge_redis_channel.delivery import Delivery
from specforge_redis_channel.entries import EntryDecoder
from specforge_redis_channel.heart import Heart, Member
from specforge_redis_channel.membership import take_place
from specforge_redis_channel.ref_writer import CLOSE_SECONDS
from specforge_redis_channel.stream import acked_bits, pending_entries

_MOST_ENTRIES = 32
_ENTRIES_PER_ACK = 500
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.001, 0.025


class RedisRefReader(RefReader):
    """Thread-safe. What an earlier reader was given and did not ack comes first."""

    def __init__(self, connection: RedisConnection, *, heart: Heart) -> None:
        """:raises ChannelError: another reader of this run lives."""
        self._connection = connection
        self._heart = heart
        self._lock = threading.Lock()
        self._session = secrets.token_hex(8)
        self._delivery = Delivery(EntryDecoder(connection.where))
        self._synced = 0
        self._closed = False
        found = take_place(
            connection,
            lambda: connection.run(REFS, "open_reader", self._session),
            what="another process reads this run's refs",
        )
        self._since = connection.count(found[0], "meta")
        """How many failures there were; only later ones are told here."""
        self._member: Member = ("r", "", self._session)
        heart.join(self, self._member)

    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        deadline = time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        while True:
            with self._lock:
                refs = self._deliver(max_refs)
            remaining = deadline - time.monotonic()
            if refs is not None or remaining <= 0:
                return refs or []
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    @property
    def drained(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            try:
                state, _, all_given = self._fetch(0)
            except ChannelFailed:
                return False
            return state == "sealed" and all_given and self._delivery.idle

    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        ids = list(sample_ids)
        with self._lock:
            self._refuse_closed()
            self._connection.call(lambda: self._ack(ids, step))
            self._delivery.drop(ids)

    def fail(self, reason: str) -> None:
        self._end("failed", reason)

    def close(self) -> None:
        self._end("closed", "")

    def _end(self, how: str, reason: str) -> None:
        self._connection.interrupt()
        with self._lock:
            self._connection.resume()
            if self._closed:
                return
            self._closed = how == "closed"
            self._heart.leave(self._member)
            with suppress(ChannelError):  # the heartbeat ends, which says the same, only later
                self._connection.call(
                    lambda: self._connection.run(REFS, "end_reader", self._session, how, plain(reason)),
                    at_most=CLOSE_SECONDS,
                )
            if self._closed:
                self._connection.close()

    def _deliver(self, max_refs: int) -> list[SampleRef] | None:
        """What is there; nothing once the channel is drained; None while something may come.

        :raises PeerDied: nothing may come, and some writer ended without closing.
        """
        state, writer, _ = self._fetch(max_refs)
        if state == "abandoned" and self._delivery.idle:
            raise PeerDied(
                "ended without closing, and no other writer lives",
                where=f"{self._connection.where}, writer {writer}",
                hint="see its log; run it again to go on",
            )
        refs = self._delivery.deliver(max_refs)
        return refs if refs or state == "sealed" else None

    def _fetch(self, max_refs: int) -> tuple[str, str, bool]:
        """Take in what is new where that is needed; the state of the writers, who ended, and whether all was given.

        :raises ChannelFailed: a writer failed since this reader was opened.
        """
        self._refuse_closed()

        def ask() -> list[Any]:
            self._resync()
            count = min(self._delivery.wanted(max_refs), _MOST_ENTRIES)
            return self._connection.run(REFS, "poll", self._session, self._since, count)

        status, *found = self._connection.call(ask)
        self._raise_if_replaced(status)
        if status == b"failed":
            raise ChannelFailed(text(found[0]), where=f"{self._connection.where}, writer {text(found[1])}")
        entries, state, writer, all_given = found
        self._delivery.add((entry[0], entry[1]) for entry in entries)
        return text(state), text(writer), all_given == b"1"

    def _resync(self) -> None:
        """On a new connection: what was given to this run's readers and not acked, from the beginning."""
        if self._synced == self._connection.number:
            return
        self._delivery.forget_places()
        # Makes this reader and its group known to a server that lost them.
        self._raise_if_replaced(self._connection.run(REFS, "ack", self._session, 0)[0])
        acked = acked_bits(self._connection)
        self._delivery.add(pending_entries(self._connection), acked)
        self._delivery.sort_in()
        self._synced = self._connection.number

    def _ack(self, ids: list[str], step: int) -> None:
        self._resync()
        changed = self._delivery.mark(ids)
        for first in range(0, len(changed), _ENTRIES_PER_ACK):
            words: list[bytes | int] = []
            for entry in changed[first : first + _ENTRIES_PER_ACK]:
                bits = f"{entry.acked:x}".encode()
                words += [entry.number, entry.acked_refs, entry.acked_bytes, bits, int(entry.complete)]
            self._raise_if_replaced(self._connection.run(REFS, "ack", self._session, step, *words)[0])

    def _raise_if_replaced(self, status: bytes) -> None:
        if status == b"replaced":
            raise ChannelError(
                "another process reads this run's refs now",
                where=self._connection.where,
                hint="this process was taken for dead; end it",
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ChannelError("this reader was closed", where=f"{self._connection.where}, reader")
