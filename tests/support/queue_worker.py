# SPDX-License-Identifier: Apache-2.0
"""A process at a file queue: ``work`` takes, waits a moment and finishes until the session ends; ``read`` tells all."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from specforge_core.channel.file_queue import FileQueue
from specforge_core.contracts import CaptureRequest, SampleRef, sample_id
from specforge_core.contracts.capture_queue import NumberedLease

TIMEOUT_SECONDS = 5.0


def make_refs(lease: NumberedLease) -> list[SampleRef]:
    """Refs as a worker puts them under a lease; torch is left out, so that a process starts at once."""
    specs, refs = CaptureRequest().specs(8, 4), []
    for place in range(lease.batch.first, lease.batch.first + lease.batch.count):
        prompt_id = f"prompt-{place}"
        refs.append(SampleRef(sample_id(prompt_id, 0), lease.number, "any", specs, 8, prompt_id, 0))
    return refs


def work(queue: FileQueue, name: str) -> None:
    member = queue.join(name)
    while queue.results(1 << 40, 0.0).ending is None:
        lease = queue.take(name, 0.1)
        if lease is not None:
            time.sleep(random.random() * 0.02)
            queue.finish(lease, make_refs(lease))
    member.close()


def read(queue: FileQueue) -> None:
    """Everything that was finished, as one JSON line; nothing is committed."""
    rows: list[list[object]] = []
    position = 0
    while found := queue.results(position, 0.0).results:
        position = found[-1].position
        rows += [[r.position, r.batch.first, r.number, [ref.sample_id for ref in r.refs]] for r in found]
    print(json.dumps(rows))


if __name__ == "__main__":
    directory, what = Path(sys.argv[1]), sys.argv[2]
    opened = FileQueue(directory, timeout_seconds=TIMEOUT_SECONDS)
    work(opened, sys.argv[3]) if what == "work" else read(opened)
    opened.close()
