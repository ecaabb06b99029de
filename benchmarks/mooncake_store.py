# SPDX-License-Identifier: Apache-2.0
"""The mooncake store against the bare client on the same tensors, alternating in one process, as ratios.

    python benchmarks/mooncake_store.py [--rounds N]

A sample is one tensor of 1, 16 or 64 MiB with its token ids and loss mask. The memory is another process's, so that
every byte crosses a socket on both sides. The bare side does with one batch call each what the library needs at least:
puts pinned objects from tensor memory, and gets them into freshly allocated tensors.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODES_MIB = (1, 16, 64)
_TOKENS = 2048
_HOLDER = """
import sys
from specforge_mooncake_store.config import MooncakeStoreConfig
from specforge_mooncake_store.connection import Connection
held = Connection(MooncakeStoreConfig(name="mooncake", master=sys.argv[1], host="127.0.0.1", segment_bytes=1 << 29))
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class MooncakeFigures:
    """Median seconds of one sample."""

    mib: int
    put: float
    get: float
    bare_put: float
    bare_get: float

    def __str__(self) -> str:
        both, bare = self.put + self.get, self.bare_put + self.bare_get
        return (
            f"{self.mib:>3} MiB: bare / ours put {self.bare_put / self.put:.3f}, get {self.bare_get / self.get:.3f}, "
            f"both {bare / both:.3f}  (put {1e3 * self.put:.3g} ms, get {1e3 * self.get:.3g} ms)"
        )


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    del result
    return seconds


class Bare:
    """The library's own client."""

    def __init__(self, address: str) -> None:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig

        self.client = MooncakeDistributedStore()
        assert self.client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", address) == 0
        self.placement = ReplicateConfig()
        self.placement.with_hard_pin = True

    def put(self, keys: list[str], tensors: list[Any]) -> None:
        pointers, sizes = [t.data_ptr() for t in tensors], [t.nbytes for t in tensors]
        assert not any(self.client.batch_put_from(keys, pointers, sizes, self.placement))

    def get(self, keys: list[str], like: list[Any]) -> list[Any]:
        import torch

        tensors = [torch.empty(t.shape, dtype=t.dtype) for t in like]
        sizes = [t.nbytes for t in tensors]
        assert self.client.batch_get_into(keys, [t.data_ptr() for t in tensors], sizes) == sizes
        return tensors


def measure(store: Any, bare: Bare, *, mib: int, rounds: int) -> MooncakeFigures:
    """Alternate put, get and delete of one sample; the first rounds warm up."""
    import torch
    from specforge_core.contracts import Sample

    features = {
        "aux_hidden_states": torch.zeros(_TOKENS, (mib << 20) // (2 * _TOKENS), dtype=torch.bfloat16),
        "input_ids": torch.arange(_TOKENS),
        "loss_mask": torch.ones(_TOKENS, dtype=torch.bool),
    }
    tensors = list(features.values())
    found: dict[str, list[float]] = {"put": [], "get": [], "bare_put": [], "bare_get": []}
    for turn in range(3 + rounds):
        refs, keys = [], [f"bare/{mib}/{turn}/{name}" for name in features]
        sample = Sample(f"p{turn}", 0, features)
        times = {
            "bare_put": timed(lambda keys=keys: bare.put(keys, tensors)),
            "put": timed(lambda sample=sample, refs=refs: refs.append(store.put(sample.sample_id, sample))),
            "bare_get": timed(lambda keys=keys: bare.get(keys, tensors)),
            "get": timed(lambda refs=refs: store.get(refs[0])),
        }
        store.delete(refs[0])
        bare.client.batch_remove(keys, True)
        if turn >= 3:
            for part, seconds in times.items():
                found[part].append(seconds)
    return MooncakeFigures(mib, **{part: statistics.median(seconds) for part, seconds in found.items()})


def figures(rounds: int) -> list[MooncakeFigures]:
    """Every mode on a master of its own, which ends with the measurement."""
    import torch
    from specforge_core.contracts import PartContext
    from specforge_mooncake_store.config import MooncakeStoreConfig
    from specforge_mooncake_store.service import start_master
    from specforge_mooncake_store.store import MooncakeStore

    torch.set_num_threads(1)
    master = start_master()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, master.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        section = MooncakeStoreConfig(name="mooncake", master=master.address, host="127.0.0.1", segment_bytes=0)
        with closing(MooncakeStore(section, PartContext(run_id="bench", directory=Path()))) as store:
            bare = Bare(master.address)
            found = [measure(store, bare, mib=mib, rounds=rounds) for mib in MODES_MIB]
            bare.client.close()
            return found
    finally:
        holder.kill()
        holder.wait()
        master.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    for line in figures(parser.parse_args().rounds):
        print(line)


if __name__ == "__main__":
    main()
