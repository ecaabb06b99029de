# SPDX-License-Identifier: Apache-2.0
"""The redis channel on a real server: refs per second published and polled, and what one ref takes in the server.

Refs are those of EAGLE-3's features, signed, in batches of 256. ``python benchmarks/redis_channel.py`` prints the
figures at 10,000 and at 100,000 refs in flight, and their ratios. Python's cycle collector is off meanwhile: it would
walk through the benchmark's own refs again and again.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specforge_core.contracts import CaptureRequest, PartContext, SampleRef, sample_id, sign

BATCH = 256
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
    left_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.refs:>7,} refs: publish {self.publish:>9,.0f}/s (last {self.publish_last:>9,.0f}), "
            f"poll {self.poll:>9,.0f}/s (last {self.poll_last:>9,.0f}), ack {self.ack:>9,.0f}/s, "
            f"{self.bytes_per_ref:.0f} bytes per ref in the server, {self.left_bytes:,} left when all are acked"
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


def measure(server: Any, refs: list[SampleRef]) -> ChannelFigures:
    """Publish, poll and ack all of ``refs`` on an idle server (``specforge_redis_channel.service.Server``)."""
    import redis
    from specforge_redis_channel.channel import RedisChannel
    from specforge_redis_channel.config import RedisChannelConfig

    client = redis.Redis.from_url(server.url)
    client.flushall()
    config = RedisChannelConfig(name="redis", url=server.url)
    channel = RedisChannel(config, PartContext(run_id="bench", directory=Path()))
    writer, reader = channel.writer("capture-0"), channel.reader()
    before = client.info("memory")["used_memory"]
    published, polled, acked = [], [], []
    for first in range(0, len(refs), BATCH):
        batch = refs[first : first + BATCH]
        published.append(_seconds(lambda batch=batch: writer.publish(batch)))
    held = client.info("memory")["used_memory"] - before
    found: list[SampleRef] = []
    while len(found) < len(refs):
        polled.append(_seconds(lambda: found.extend(reader.poll(BATCH, 5.0))))
    if found != refs or writer.in_flight().refs != len(refs):
        raise RuntimeError("what came out is not what went in")
    for first in range(0, len(refs), BATCH):
        ids = [ref.sample_id for ref in refs[first : first + BATCH]]
        acked.append(_seconds(lambda ids=ids: reader.ack(ids, step=1)))
    left = sum(client.memory_usage(key) for key in client.scan_iter("specforge:*"))
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
        left_bytes=left,
    )


def _seconds(call: Any) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def compare() -> tuple[ChannelFigures, ChannelFigures]:
    """At 10,000 and at 100,000 refs, on a server of their own."""
    from specforge_redis_channel.service import start_server

    refs = make_refs(100_000)
    server = start_server()
    gc.disable()
    try:
        measure(server, refs[:2_560])  # warm: scripts, imports, allocator
        return measure(server, refs[:10_000]), measure(server, refs)
    finally:
        gc.enable()
        server.stop()


def main() -> None:
    small, large = compare()
    print(small)
    print(large)
    print(
        f"cost at 100,000 over cost at 10,000: publish {small.publish / large.publish:.2f}, "
        f"poll {small.poll / large.poll:.2f}, ack {small.ack / large.ack:.2f}"
    )


if __name__ == "__main__":
    main()
