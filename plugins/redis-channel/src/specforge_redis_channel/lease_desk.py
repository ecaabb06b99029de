# SPDX-License-Identifier: Apache-2.0
"""The desk: batches to be captured, and who is capturing them, kept by the server for all processes."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from specforge_core.contracts import CaptureBatch, ChannelError, Lease, LeaseDesk, read_batch
from specforge_core.contracts.files import parse_json

from specforge_redis_channel.connection import LEASES, RedisConnection, plain, text
from specforge_redis_channel.heart import Heart

_BATCHES_PER_OFFER = 1000
_MOST_BYTES = 8 << 20
"""Of one batch: a million offsets that are wanted, the most that a batch has, take some 7 MB."""
_MOST_DIGITS = 19
_BEAT_SECONDS = 5.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.05


class RedisLeaseDesk(LeaseDesk):
    """Thread-safe. A lease is its holder's for as long as the heartbeat of the writer of that name lasts."""

    def __init__(self, connection: RedisConnection, *, heart: Heart) -> None:
        self._connection = connection
        self._heart = heart
        self._lock = threading.Lock()
        self._closed = False

    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        for first in range(0, len(batches), _BATCHES_PER_OFFER):
            words: list[bytes] = []
            for batch in batches[first : first + _BATCHES_PER_OFFER]:
                words += [plain(batch.key), json.dumps(asdict(batch), separators=(",", ":")).encode()]
            self._ask("offer", *words)

    def take(self, holder: str, timeout: float) -> Lease | None:
        deadline = time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        # One name for all asking: a lease whose reply was lost is found again by it, not left to nobody.
        request = secrets.token_hex(8).encode()
        told = False
        while True:
            status, *found = self._ask("take", plain(holder), request)
            if status == b"lease":
                return Lease(batch=self._batch(found[1]), holder=holder, attempt=int(found[0]))
            if status == b"unknown":
                self._raise_if_not_open(holder, told)
                self._heart.beat(at_most=_BEAT_SECONDS)  # a server that lost everything does not know its writers yet
                told = True
                continue
            told = False
            remaining = deadline - time.monotonic()
            if status == b"ended" or remaining <= 0:
                return None
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def finish(self, lease: Lease) -> None:
        self._ask("finish", plain(lease.batch.key), plain(lease.holder), lease.attempt)

    def give_back(self, lease: Lease) -> None:
        self._ask("give_back", plain(lease.batch.key), plain(lease.holder), lease.attempt)

    def outstanding(self) -> list[CaptureBatch]:
        records = [record.split(b" ", 2) for record in self._ask("outstanding")[1]]
        return [self._batch(record[-1]) for record in sorted(records, key=self._offer_number)]

    def end(self, reason: str) -> None:
        self._ask("end", plain(reason))

    @property
    def ended(self) -> str | None:
        reason = self._ask("ended")[1:]
        return text(reason[0]) if reason and reason[0] is not None else None

    def close(self) -> None:
        """Leases are their holders', not the desk's: they stay until finished, or until the holder ends."""
        self._connection.interrupt()
        with self._lock:
            self._closed = True
            self._connection.close()

    def _ask(self, operation: str, *arguments: bytes | int) -> list[Any]:
        with self._lock:
            if self._closed:
                raise ChannelError("this desk was closed", where=self._connection.where)
            return self._connection.call(lambda: self._connection.run(LEASES, operation, *arguments))

    def _raise_if_not_open(self, holder: str, told: bool) -> None:
        if told:
            raise ChannelError(
                "only an open writer can hold a lease", where=f"{self._connection.where}, writer {holder}"
            )

    def _offer_number(self, record: list[bytes]) -> int:
        try:
            return int(record[0][:_MOST_DIGITS])
        except ValueError:
            raise self._damaged(b" ".join(record)) from None

    def _batch(self, record: bytes) -> CaptureBatch:
        """:raises ChannelError: it is not what a desk offered."""
        try:
            values = parse_json(record) if len(record) <= _MOST_BYTES else None
            if type(values) is not dict:
                raise ValueError("no table")
            return read_batch(values)
        except ValueError:
            raise self._damaged(record) from None

    def _damaged(self, record: bytes) -> ChannelError:
        return ChannelError(
            f"an offered batch was not written by a desk: {text(record[:60])!r}",
            where=f"{self._connection.where}:batches",
            hint="find out who else writes there; remove this run's keys, then run again",
        )
