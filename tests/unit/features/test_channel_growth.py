# SPDX-License-Identifier: Apache-2.0
"""A run publishes millions of refs: what channels keep, write and read must not grow with those that are done."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from specforge_core.contracts import CaptureBatch, PartContext, RefChannel, SampleRef, sign
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.hooks.builtin import FileChannelConfig, MemoryChannelConfig
from specforge_core.testing.samples import make_ref

ROUND_REFS = 512


def memory_channel(directory: Path) -> RefChannel:
    return MemoryChannel(MemoryChannelConfig(name="memory"), PartContext(run_id="run", directory=directory))


def file_channel(directory: Path) -> RefChannel:
    return FileChannel(FileChannelConfig(name="file"), PartContext(run_id="run", directory=directory))


def rounds(channel: RefChannel) -> Iterator[int]:
    """Batch after batch through desk, writer and reader; the bytes that Python holds after each is done."""
    writer, reader, desk = channel.writer("capture-0"), channel.reader(), channel.leases()
    number = 0
    while True:
        desk.offer([CaptureBatch(split="train", epoch=0, first=number, count=ROUND_REFS)])
        lease = desk.take("capture-0", 5.0)
        assert lease is not None
        writer.publish([make_ref(number + offset) for offset in range(ROUND_REFS)])
        desk.finish(lease)
        refs: list[SampleRef] = []
        while len(refs) < ROUND_REFS:
            refs += reader.poll(100, 5.0)
        reader.ack([ref.sample_id for ref in refs], step=number)
        assert writer.in_flight().refs == 0
        number += ROUND_REFS
        del refs
        gc.collect()
        yield tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("make_channel", [memory_channel, file_channel])
def test_nothing_is_kept_of_what_was_acked(tmp_path: Path, make_channel: Callable[[Path], RefChannel]) -> None:
    tracemalloc.start()
    try:
        held = rounds(make_channel(tmp_path))
        early = [next(held) for _ in range(4)][-1]
        late = [next(held) for _ in range(12)][-1]
    finally:
        tracemalloc.stop()
    assert late - early < 20 * ROUND_REFS  # twelve rounds: less than two bytes a ref


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[int]]:
    """Sizes of what a call of ``os`` gave or took while it was watched."""
    sizes: list[int] = []
    real = getattr(os, name)

    def watched(*arguments: object) -> object:
        result = real(*arguments)
        sizes.append(len(result) if isinstance(result, bytes) else 0)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(os, name, watched)
        yield sizes


def test_polls_and_leases_read_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = file_channel(tmp_path)
    writer, reader, desk = channel.writer("capture-0"), channel.reader(), channel.leases()
    writer.in_flight()

    def read_in_a_round(number: int) -> int:
        with counted(monkeypatch, "pread") as sizes:
            desk.offer([CaptureBatch(split="train", epoch=0, first=number, count=8)])
            lease = desk.take("capture-0", 5.0)
            assert lease is not None
            writer.publish([make_ref(number + offset) for offset in range(8)])
            desk.finish(lease)
            refs = reader.poll(8, 5.0)
            reader.ack([ref.sample_id for ref in refs], step=0)
            writer.in_flight()
        return sum(sizes)

    early = max(read_in_a_round(10_000 + 8 * number) for number in range(3))
    late = max(read_in_a_round(20_000 + 8 * number) for number in range(300))
    assert late <= 1.1 * early


def test_a_batch_is_synced_once_and_a_ref_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = file_channel(tmp_path).writer("capture-0")
    path = tmp_path / "refs" / "capture-0.refs"
    writer.publish([make_ref(number) for number in range(7)])
    unsigned = [make_ref(number) for number in range(256)]
    signed = [sign(ref, token="secret", run_id="run") for ref in unsigned]
    for refs, most in ((unsigned, 44), (signed, 74)):
        before = path.stat().st_size
        with counted(monkeypatch, "fdatasync") as synced:
            writer.publish(refs)
        assert len(synced) == 1
        assert (path.stat().st_size - before) / 256 <= most
    writer.close()
