# SPDX-License-Identifier: Apache-2.0
"""Stream entries of the Redis channel: each can be read alone, whatever its writer published before."""

from __future__ import annotations

from dataclasses import replace

from specforge_core.contracts import SampleRef
from specforge_core.testing.samples import make_ref
from specforge_redis_channel.entries import EntryDecoder, EntryEncoder


def encoded(encoder: EntryEncoder, refs: list[SampleRef]) -> list[tuple[bytes, bytes]]:
    fields = encoder.encode(refs)
    return list(zip(fields[::2], fields[1::2], strict=True))


def decoded(layouts: bytes, batch: bytes) -> list[SampleRef]:
    """By a reader that has seen nothing else."""
    writer, refs = EntryDecoder("here").decode((b"1-0", [b"w", b"a", b"l", layouts, b"r", batch]))
    assert writer == b"a"
    return refs


def test_every_entry_can_be_read_alone() -> None:
    encoder = EntryEncoder()
    for number in range(100):
        refs = [replace(make_ref(other), store=f"store-{other % 3}") for other in range(number, number + 3)]
        [entry] = encoded(encoder, refs)
        assert decoded(*entry) == refs


def test_entries_of_ever_new_layouts_do_not_grow() -> None:
    encoder = EntryEncoder()
    sizes = []
    for number in range(200):
        ref = replace(make_ref(number), store=f"store-{number:04d}")
        [(layouts, batch)] = encoded(encoder, [ref])
        assert decoded(layouts, batch) == [ref]
        sizes.append(len(layouts))
    assert max(sizes[20:]) <= max(sizes[:20])


def test_a_large_publish_is_several_entries() -> None:
    refs = [make_ref(number) for number in range(600)]
    entries = encoded(EntryEncoder(), refs)
    assert [len(decoded(*entry)) for entry in entries] == [256, 256, 88]
    assert [ref for entry in entries for ref in decoded(*entry)] == refs
