# SPDX-License-Identifier: Apache-2.0
"""Ref channels: refs per second published (durably, where the channel is durable) and polled, and bytes per ref.

Refs are those of EAGLE-3's features, signed, in batches of 256, at 10,000 and at 100,000 refs in flight. Python's cycle
collector is off meanwhile: it would walk through the benchmark's own refs again and again.

    python benchmarks/channels.py [file] [redis] [--directory DIR]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quiet import say_whether_quiet
from specforge_core.contracts import CaptureRequest, PartContext, RefChannel, SampleRef, sample_id, sign

BATCH = 256
SMALL, LARGE = 10_000, 100_000
_PROBES = 20


@dataclass(frozen=True)
class ChannelFigures:
    """``publish`` and ``poll``: refs per second over all of them, ``*_last``: of the last batches (medians)."""

    refs: int
    publish: float
    publish_last: float
    poll: float
    poll_last: float
    ack: float
    bytes_per_ref: float

    def __str__(self) -> str:
        return (
            f"{self.refs:>7,} refs: publish {self.publish:>9,.0f}/s (last {self.publish_last:>9,.0f}), "
            f"poll {self.poll:>9,.0f}/s (last {self.poll_last:>9,.0f}), ack {self.ack:>9,.0f}/s, "
            f"{self.bytes_per_ref:.0f} bytes per ref"
        )


def make_refs(count: int) -> list[SampleRef]:
    """Signed refs of prompts of 100 to 2,000 tokens."""
    request = CaptureRequest(aux_layer_ids=(1, 17, 32), last_hidden_norm="post", dtype="bfloat16")
    refs = []
    for number in range(count):
        tokens, name = 100 + number * 37 % 1900, f"sharegpt-{number:07d}"
        features = request.specs(tokens, 4096)
        ref = SampleRef(sample_id(name, 0), 1, "mooncake", features, tokens, name, 0)
        refs.append(replace(ref, signature=sign(ref, token="secret", run_id="bench").signature))
    return refs


def measure(channel: RefChannel, refs: list[SampleRef], held_bytes: Callable[[], int]) -> ChannelFigures:
    """Publish, poll and ack all of ``refs`` on a channel of their own."""
    gc.disable()
    try:
        return _measure(channel, refs, held_bytes)
    finally:
        gc.enable()


def _measure(channel: RefChannel, refs: list[SampleRef], held_bytes: Callable[[], int]) -> ChannelFigures:
    writer, reader = channel.writer("capture-0"), channel.reader()
    before = held_bytes()
    published, polled, acked = [], [], []
    for first in range(0, len(refs), BATCH):
        batch = refs[first : first + BATCH]
        published.append(_seconds(lambda batch=batch: writer.publish(batch)))
    held = held_bytes() - before
    found: list[SampleRef] = []
    while len(found) < len(refs):
        polled.append(_seconds(lambda: found.extend(reader.poll(BATCH, 5.0))))
    if found != refs or writer.in_flight().refs != len(refs):
        raise RuntimeError("what came out is not what went in")
    for first in range(0, len(refs), BATCH):
        ids = [ref.sample_id for ref in refs[first : first + BATCH]]
        acked.append(_seconds(lambda ids=ids: reader.ack(ids, step=1)))
    writer.close()
    reader.close()
    return ChannelFigures(
        refs=len(refs),
        publish=len(refs) / sum(published),
        publish_last=BATCH / statistics.median(published[-_PROBES:]),
        poll=len(refs) / sum(polled),
        poll_last=BATCH / statistics.median(polled[-_PROBES:]),
        ack=len(refs) / sum(acked),
        bytes_per_ref=held / len(refs),
    )


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def compare_files(directory: Path) -> tuple[ChannelFigures, ChannelFigures]:
    """At 10,000 and at 100,000 refs, each in a directory of its own."""
    from specforge_core.features.file_channel import FileChannel
    from specforge_core.hooks.builtin import FileChannelConfig

    def at(count: int) -> ChannelFigures:
        with tempfile.TemporaryDirectory(prefix="channel-", dir=directory) as place:
            context = PartContext(run_id="bench", directory=Path(place))
            channel = FileChannel(FileChannelConfig(name="file"), context)
            files = Path(place) / "refs"
            return measure(channel, refs[:count], lambda: sum(path.stat().st_size for path in files.glob("*.refs")))

    refs = make_refs(LARGE)
    at(10 * BATCH)  # warm
    return at(SMALL), at(LARGE)


def compare_redis() -> tuple[ChannelFigures, ChannelFigures]:
    """At 10,000 and at 100,000 refs, on a server of their own; nothing but the refs is in it."""
    import redis
    from specforge_redis_channel.channel import RedisChannel
    from specforge_redis_channel.config import RedisChannelConfig
    from specforge_redis_channel.service import start_server

    refs, server = make_refs(LARGE), start_server()
    client = redis.Redis.from_url(server.url)

    def at(count: int) -> ChannelFigures:
        client.flushall()
        config = RedisChannelConfig(name="redis", url=server.url)
        channel = RedisChannel(config, PartContext(run_id="bench", directory=Path()))
        return measure(channel, refs[:count], lambda: client.info("memory")["used_memory"])

    try:
        at(10 * BATCH)  # warm: scripts, imports, allocator
        return at(SMALL), at(LARGE)
    finally:
        server.stop()


def describe(figures: tuple[ChannelFigures, ChannelFigures]) -> list[str]:
    small, large = figures
    return [
        str(small),
        str(large),
        f"cost of a ref at {LARGE:,} over that at {SMALL:,}: publish {small.publish / large.publish:.2f}, "
        f"poll {small.poll / large.poll:.2f}, ack {small.ack / large.ack:.2f}",
        f"at {LARGE:,} against the reference trainer's 8,300 and 28,000 refs/s and 1,315 bytes: publish "
        f"{large.publish / 8300:.1f} times, poll {large.poll / 28000:.1f} times, "
        f"bytes {large.bytes_per_ref / 1315:.3f} times",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("channels", nargs="*", metavar="CHANNEL", default=["file", "redis"])
    parser.add_argument("--directory", type=Path, help="for files; default: the system's temporary directory")
    options = parser.parse_args()
    say_whether_quiet()
    for name in options.channels:
        print(f"channel {name}")
        found = compare_redis() if name == "redis" else compare_files(options.directory or Path(tempfile.gettempdir()))
        for line in describe(found):
            print(f"  {line}")


if __name__ == "__main__":
    main()
