# SPDX-License-Identifier: Apache-2.0
"""A process that puts samples into a Mooncake store until it is killed: ``ADDRESS RUN_ID FIRST COUNT TOKENS TIMES``.

Prints ``<number> <generation>`` after each put, then ``done``, and goes on living with its segment.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from specforge_core.contracts import PartContext, SampleRef, describe_sample
from specforge_core.testing.samples import make_sample
from specforge_mooncake_store.config import MooncakeStoreConfig


class Producer:
    """The process, as the test that kills it sees it."""

    def __init__(self, address: str, run_id: str, *, count: int, first: int = 0, tokens: int = 5, times: int = 1):
        arguments = [address, run_id, *map(str, (first, count, tokens, times))]
        self._tokens = tokens
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ref(self) -> SampleRef | None:
        """The next sample it put; None when it has put all."""
        assert self._process.stdout is not None
        number, _, generation = self._process.stdout.readline().strip().partition(" ")
        assert number, "the producer ended"
        if number == "done":
            return None
        sample = make_sample(int(number), num_tokens=self._tokens)
        ref = describe_sample(sample.sample_id, sample, store="mooncake")
        return dataclasses.replace(ref, generation=int(generation))

    def refs(self) -> list[SampleRef]:
        """Everything it puts."""
        return list(iter(self.ref, None))

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)


def main(address: str, run_id: str, *numbers: str) -> None:
    """Put, then wait to be killed."""
    from specforge_mooncake_store.store import MooncakeStore

    first, count, tokens, times = map(int, numbers)
    section = MooncakeStoreConfig(name="mooncake", master=address, host="127.0.0.1", segment_bytes=64 << 20)
    store = MooncakeStore(section, PartContext(run_id=run_id, directory=Path()))
    for _ in range(times):
        for number in range(first, first + count):
            sample = make_sample(number, num_tokens=tokens)
            print(number, store.put(sample.sample_id, sample).generation, flush=True)
    print("done", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:3], *sys.argv[3:])
