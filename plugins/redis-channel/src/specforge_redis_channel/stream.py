# SPDX-License-Identifier: Apache-2.0
"""Reading what stands in the stream, without taking it: inside an operation of a connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from specforge_core.contracts import SampleRef

from specforge_redis_channel.connection import RedisConnection
from specforge_redis_channel.entries import EntryDecoder, RawEntry

_ENTRIES_PER_CALL = 64


def acked_bits(connection: RedisConnection) -> dict[bytes, int]:
    """The entries of which some refs are acked, and which: a bit per ref.

    :raises ChannelError: what the server keeps there is none of ours.
    """
    found = connection.execute("HGETALL", f"{connection.base}:acked")
    try:
        return {found[i]: _bits(found[i + 1]) for i in range(0, len(found), 2)}
    except (ValueError, IndexError):
        raise connection.damaged(f"{connection.base}:acked") from None


def _bits(record: bytes) -> int:
    """:raises ValueError: it is none of ours (or IndexError)."""
    bits = int(record.split()[2], 16)
    if bits < 0:
        raise ValueError("bits are not negative")
    return bits


def pending_entries(connection: RedisConnection) -> Iterator[RawEntry]:
    """What this run's readers were given and did not ack, oldest first. A removed entry has no fields."""
    last: bytes | str = "0"
    while True:
        command = ("XREADGROUP", "GROUP", "reader", "reader", "COUNT", _ENTRIES_PER_CALL)
        found = connection.execute(*command, "STREAMS", f"{connection.base}:refs", last)
        entries = found[0][1] if found else []
        if not entries:
            return
        yield from ((entry[0], entry[1]) for entry in entries if entry[1] is not None)
        last = entries[-1][0]


def unacked(connection: RedisConnection, decoder: EntryDecoder, acked: Mapping[bytes, int]) -> list[SampleRef]:
    """Every ref that no reader acked, each writer's in order; of a sample that was published again, the last one."""
    by_writer: dict[bytes, list[SampleRef]] = {}
    newest: dict[str, SampleRef] = {}
    start = b"-"
    while True:
        entries = connection.execute("XRANGE", f"{connection.base}:refs", start, "+", "COUNT", _ENTRIES_PER_CALL)
        for entry in entries:
            writer, refs = decoder.decode((entry[0], entry[1]))
            bits = acked.get(entry[0], 0)
            kept = [ref for index, ref in enumerate(refs) if not bits >> index & 1]
            by_writer.setdefault(writer, []).extend(kept)
            newest.update((ref.sample_id, ref) for ref in kept)
        if len(entries) < _ENTRIES_PER_CALL:
            break
        start = b"(" + entries[-1][0]
    return [ref for refs in by_writer.values() for ref in refs if newest[ref.sample_id] is ref]
