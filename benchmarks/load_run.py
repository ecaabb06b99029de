# SPDX-License-Identifier: Apache-2.0
"""A load run: 20,000 samples through 4 capture processes and one trainer stub, with backpressure on.

The wires, the capture loop, the supply, the ledger and the signatures are the real ones; the target and the training
are stubs, so that what is loaded is the movement of features. Lengths are mixed as conversations are: most are short,
some are as long as allowed. It prints, and fails unless, the resident bytes of features never exceeded the high
watermark, every sample came once and whole, nothing was left, and the memory of every process stayed flat.

    python benchmarks/load_run.py [--samples 20000] [--captures 4] [--directory DIR] [--store JSON] [--channel JSON]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from specforge_core.capture.loop import CaptureLimits, CaptureLoop, CaptureParts
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    INPUT_IDS,
    LOSS_MASK,
    CaptureRequest,
    PartContext,
    Prompt,
    Sample,
    SilentProgress,
    StopSignal,
    TargetInfo,
    check_signature,
    sample_id,
    sign,
)
from specforge_core.features.ledger import Ledger
from specforge_core.hooks.descriptors import resolve
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.loading.backpressure import Watermarks
from specforge_core.loading.demand import Demand
from specforge_core.loading.planned import cut_batches
from specforge_core.loading.supply import Supply, SupplyParts
from specforge_core.loading.trusted_refs import TrustedRefs

HIDDEN, LAYERS, VOCABULARY = 64, 3, 32_000
LONGEST = 2048
BATCH, WINDOW, CHECKPOINT_WINDOWS = 8, 16, 10
TOKEN = "a secret of the load run"
REQUEST = CaptureRequest(aux_layer_ids=tuple(range(LAYERS)))
BYTES_PER_TOKEN = sum(spec.nbytes for spec in REQUEST.specs(1, HIDDEN))
FLAT_FACTOR, FLAT_BYTES = 1.10, 24 << 20


def length(index: int) -> int:
    """Tokens of prompt ``index``: log-normal with a median of 180, cut at the longest."""
    return min(LONGEST, max(8, round(random.Random(index).lognormvariate(math.log(180), 0.9))))


@dataclass(frozen=True)
class Prompts(Sequence[Prompt]):
    """Prompts made when they are asked for."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        tokens = length(index)
        return Prompt(f"p{index:06d}", [(index + n) % VOCABULARY for n in range(tokens)], [1] * tokens)


class StubTarget:
    """Features that follow from the prompt alone, made as fast as memory is filled."""

    info = TargetInfo("stub", "stub", LAYERS, HIDDEN, VOCABULARY, "float32", 1, 1, 1, 1, 1e-6, LONGEST)

    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        for prompt in prompts:
            ids = torch.tensor(prompt.input_ids)
            hidden = (ids[:, None, None] + torch.arange(LAYERS)[:, None] + torch.arange(HIDDEN)).float()
            mask = torch.ones(len(ids), dtype=torch.bool)
            yield Sample(prompt.prompt_id, epoch, {INPUT_IDS: ids, LOSS_MASK: mask, AUX_HIDDEN_STATES: hidden})


@dataclass(frozen=True)
class Wiring:
    """Which store and channel, with their settings, as JSON for the child processes."""

    directory: str
    store: dict[str, Any]
    channel: dict[str, Any]

    def open(self) -> tuple[Any, Any]:
        registry = PluginRegistry.discover()
        context = PartContext(run_id="load-run", directory=Path(self.directory), token=TOKEN)
        parts = (registry.part("feature-store", self.store["name"]), registry.part("ref-channel", self.channel["name"]))
        sections = (self.store, self.channel)
        store, channel = (
            resolve(part.factory)(part.config.model_validate(section), context)
            for part, section in zip(parts, sections, strict=True)
        )
        return store, channel


def capture(wiring: Wiring, *, samples: int, name: str) -> None:
    """One capture process."""
    torch.set_num_threads(1)
    store, channel = wiring.open()
    prompts, writer, desk = Prompts(samples), channel.writer(name), channel.leases()
    parts: Any = CaptureParts(
        engine=StubTarget(),  # type: ignore[arg-type]
        request=REQUEST,
        store=store,
        writer=writer,
        desk=desk,
        prompts=lambda batch: prompts[batch.first : batch.first + batch.count],
        sign=lambda ref: sign(ref, token=TOKEN, run_id="load-run"),
        holder=name,
    )
    limits = CaptureLimits(max_attempts=3, deadline_seconds=120.0, room_seconds=120.0)
    CaptureLoop(parts, limits=limits, progress=SilentProgress(), stop=StopSignal()).run(lambda: desk.ended is None)
    writer.close()
    desk.close()
    store.close()


class Watch(threading.Thread):
    """Memory of every process and, for files, resident bytes of features, a few times a second."""

    def __init__(self, processes: dict[str, int], features: Path | None) -> None:
        super().__init__(daemon=True)
        self._processes = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._features = features
        self._stop_requested = threading.Event()
        self.memory: dict[str, list[int]] = {name: [] for name in processes}
        self.most_bytes = 0

    def run(self) -> None:
        while not self._stop_requested.wait(0.25):
            for name, process in self._processes.items():
                try:
                    self.memory[name].append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            if self._features is not None:
                self.most_bytes = max(self.most_bytes, sum(map(tensor_bytes, self._features.rglob("*.safetensors"))))

    def end(self) -> None:
        self._stop_requested.set()
        self.join(10.0)


def tensor_bytes(path: Path) -> int:
    """A sample file's bytes without its header."""
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            return path.stat().st_size - 8 - header
    except FileNotFoundError:
        return 0


def train(wiring: Wiring, *, samples: int, watermarks: Watermarks) -> dict[str, Any]:
    """The trainer stub: windows in order, each sample read and checked, a "checkpoint" every so many windows."""
    store, channel = wiring.open()
    reader, desk = channel.reader(), channel.leases()
    ledger = Ledger(Path(wiring.directory) / "ledger.sqlite", run_id="load-run")
    demand = Demand(desk, watermarks)
    supply = Supply(
        SupplyParts(
            reader=reader,
            store=store,
            ledger=ledger,
            demand=demand,
            trusted=TrustedRefs(lambda ref: check_signature(ref, token=TOKEN, run_id="load-run")),
            progress=SilentProgress(),
            stop=StopSignal(),
            reuse_features=False,
            free="checkpoint",
            deadline_seconds=120.0,
        )
    )
    prompts, target, nbytes, most = Prompts(samples), StubTarget(), 0, 0
    supply.rewind(0)
    supply.want(
        cut_batches(
            range(samples),
            lambda index: (sample_id(f"p{index:06d}", 0), BYTES_PER_TOKEN * length(index)),
            batch=("train", 0, ""),
            size=BATCH,
            places=range(samples),
        )
    )
    began = time.monotonic()
    for window, first in enumerate(range(0, samples, WINDOW)):
        indices = range(first, min(first + WINDOW, samples))
        keys = [sample_id(f"p{index:06d}", 0) for index in indices]
        supply.collect(keys, what=f"window {window}", patient=True)
        refs = supply.deal(window, keys)
        for index, ref in zip(indices, refs, strict=True):
            [expected] = target.capture([prompts[index]], REQUEST, 0)
            got = store.get(ref)
            assert all(torch.equal(got.features[name], tensor) for name, tensor in expected.features.items()), ref
            nbytes += ref.nbytes
        most = max(most, demand.in_flight.refs)
        supply.trained(window, refs)
        if (window + 1) % CHECKPOINT_WINDOWS == 0 or supply.short_of_room:
            supply.free_covered(window + 1)
        if window % 125 == 0:
            print(f"  window {window} of {math.ceil(samples / WINDOW)}", file=sys.stderr, flush=True)
    supply.free_covered(math.ceil(samples / WINDOW))
    desk.end("the load run is over")
    seconds = time.monotonic() - began
    dealt = [sample for _, sample, _, trained in ledger.deals() if trained]
    assert len(dealt) == len(set(dealt)) == samples, "samples were lost or trained twice"
    left = store.usage()
    reader.close()
    desk.close()
    ledger.close()
    return {"seconds": seconds, "nbytes": nbytes, "most_refs": most, "left": left.samples, "store": store}


def run_load(wiring: Wiring, *, samples: int, captures: int) -> dict[str, Any]:
    """The whole run; what it measured."""
    torch.set_num_threads(1)
    sample = BYTES_PER_TOKEN * LONGEST
    watermarks = Watermarks(
        high_watermark_refs=12 * WINDOW, low_watermark_refs=4 * WINDOW, high_watermark_bytes=sample * 3 * WINDOW
    )
    command = [sys.executable, __file__, "--samples", str(samples), "--child", json.dumps(vars(wiring))]
    children = {f"capture-{n}": subprocess.Popen([*command, "--name", f"capture-{n}"]) for n in range(captures)}
    features = Path(wiring.directory) / "store" if wiring.store["name"] == "file" else None
    watch = Watch({"trainer": psutil.Process().pid, **{name: child.pid for name, child in children.items()}}, features)
    watch.start()
    try:
        result = train(wiring, samples=samples, watermarks=watermarks)
        for child in children.values():
            assert child.wait(30.0) == 0, "a capture process failed"
    finally:
        watch.end()
        for child in children.values():
            child.kill()
    result.pop("store").close()
    result["high_watermark_bytes"] = watermarks.high_watermark_bytes
    result["most_bytes"] = watch.most_bytes
    result["memory"] = {name: growth(values) for name, values in watch.memory.items()}
    return result


def check(result: dict[str, Any], *, memory: bool) -> None:
    """:raises AssertionError: a promise was not kept."""
    assert result["left"] == 0, "features were left in the store"
    assert result["most_bytes"] <= result["high_watermark_bytes"], "more was resident than the high watermark allows"
    for name, (early, late) in result["memory"].items() if memory else ():
        assert late <= max(early * FLAT_FACTOR, early + FLAT_BYTES), f"memory of {name} grew from {early} to {late}"


def growth(values: Sequence[int]) -> tuple[int, int]:
    """Memory early (second quarter) and late (last quarter) in a process's life, medians."""
    quarter = max(1, len(values) // 4)
    return round(statistics.median(values[quarter : 2 * quarter] or values)), round(
        statistics.median(values[-quarter:])
    )


def describe(result: dict[str, Any], wiring: Wiring, *, samples: int, captures: int) -> None:
    mebibytes, seconds = result["nbytes"] / 2**20, result["seconds"]
    print(
        f"{samples} samples, {mebibytes / 1024:.2f} GiB, {captures} capture processes, store {wiring.store['name']}, "
        f"channel {wiring.channel['name']}: {seconds:.0f} s, {samples / seconds:.0f} samples/s, "
        f"{mebibytes / seconds:.0f} MiB/s"
    )
    high = result["high_watermark_bytes"] / 2**20
    print(f"resident at most {result['most_bytes'] / 2**20:.1f} MiB of features; high watermark {high:.1f} MiB")
    for name, (early, late) in result["memory"].items():
        print(f"memory of {name}: {early / 2**20:.0f} MiB early, {late / 2**20:.0f} MiB late")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--captures", type=int, default=4)
    parser.add_argument("--directory", type=Path, help="for files; default: memory-backed where there is /dev/shm")
    parser.add_argument("--store", default='{"name": "file"}', help="the store's section, as JSON")
    parser.add_argument("--channel", default='{"name": "file"}', help="the channel's section, as JSON")
    parser.add_argument("--ignore-memory", action="store_true", help="short runs say nothing about growth")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        capture(Wiring(**json.loads(options.child)), samples=options.samples, name=options.name)
        return
    shm = Path("/dev/shm")
    place = options.directory or (shm if shm.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="load-run-", dir=place) as directory:
        wiring = Wiring(directory, json.loads(options.store), json.loads(options.channel))
        result = run_load(wiring, samples=options.samples, captures=options.captures)
    if options.json:
        print(json.dumps(result))
    else:
        describe(result, wiring, samples=options.samples, captures=options.captures)
    check(result, memory=not options.ignore_memory)


if __name__ == "__main__":
    main()
