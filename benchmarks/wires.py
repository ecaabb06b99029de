# SPDX-License-Identifier: Apache-2.0
"""Stores and channels against what they are measured by, alternating in one run, as ratios.

    python benchmarks/wires.py [SECTION ...] [--directory DIR] [--rounds N]

Most sections compare sides; each side is a process that waits while the other works (see alternation.py). A side is a
function that is given a scratch directory and a mode, and returns a step: one call does the work once and says how many
seconds each part of it took. Another section is another entry of SECTIONS. Channels and the mooncake store, which need
no second process, are measured by modules of their own and joined here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import channels
import mooncake_store
from alternation import Side
from quiet import say_whether_quiet

Step = Callable[[], dict[str, float]]
Times = Mapping[str, float]
"""Median seconds of each part of a side's step."""

TOKENS = {"50 MB": 4096, "small": 16}
LAYERS, HIDDEN = 3, 2048
SMALL_HIDDEN = 64
RESIDENT, PUTS = 8_000, 50


@dataclass(frozen=True)
class Section:
    """Sides that are compared, in every mode, and how that is said."""

    title: str
    modes: tuple[str, ...]
    sides: Mapping[str, Callable[[Path, str], Step]]
    show: Callable[[Mapping[str, Times]], list[str]]


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - begin
    del result  # what it returned is freed outside of what was measured
    return seconds


def make_features(mode: str) -> dict:
    """bf16 aux hidden states of three layers, token ids and loss mask."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens, hidden = TOKENS[mode], HIDDEN if mode == "50 MB" else SMALL_HIDDEN
    return {
        "aux_hidden_states": torch.randn(tokens, LAYERS, hidden, generator=generator).bfloat16(),
        "input_ids": torch.arange(tokens),
        "loss_mask": torch.ones(tokens, dtype=torch.bool),
    }


def open_store(directory: Path):
    from specforge_core.contracts import PartContext
    from specforge_core.features.file_store import FileStore
    from specforge_core.hooks.builtin import FileStoreConfig

    return FileStore(FileStoreConfig(name="file", path=directory), PartContext(run_id="bench", directory=directory))


def file_store_side(directory: Path, mode: str) -> Step:
    from specforge_core.contracts import Sample

    store, sample = open_store(directory), Sample("p", 0, make_features(mode))
    number = 0

    def step() -> dict[str, float]:
        nonlocal number
        number += 1
        refs = []
        seconds = {
            "put": timed(lambda: refs.append(store.put(f"p{number}.e0", sample))),
            "sync": timed(store.sync),
            "get": timed(lambda: store.get(refs[0])),
        }
        return {**seconds, "delete": timed(lambda: store.delete(refs[0]))}

    return step


def safetensors_side(directory: Path, mode: str) -> Step:
    """load_file maps the file: cloning gives memory of one's own, summing looks at all of the mapping."""
    import os

    import torch
    from safetensors.torch import load_file, save_file

    features = make_features(mode)
    number = 0

    def sync(path: Path) -> None:
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def step() -> dict[str, float]:
        nonlocal number
        number += 1
        path = directory / f"p{number}.safetensors"
        seconds = {
            "save": timed(lambda: save_file(features, path)),
            "sync": timed(lambda: sync(path)),
            "load": timed(lambda: load_file(path)),
            "load and clone": timed(lambda: {name: tensor.clone() for name, tensor in load_file(path).items()}),
            "load and read": timed(lambda: [t.view(-1).view(torch.int64).sum() for t in load_file(path).values()]),
        }
        path.unlink()
        return seconds

    return step


def show_file_store(found: Mapping[str, Times]) -> list[str]:
    ours, peer = found["file store"], found["safetensors"]
    both = ours["put"] + ours["get"]
    return [
        _parts(found),
        f"save + load and clone / put + get: {(peer['save'] + peer['load and clone']) / both:.2f}"
        "  (tensors in memory of the reader's own; ours are checked besides)",
        f"save + load and read / put + get: {(peer['save'] + peer['load and read']) / both:.2f}"
        "  (a mapping of the file, every byte looked at once)",
        f"save + load / put + get: {(peer['save'] + peer['load']) / both:.2f}  (a mapping of the file, not read)",
        f"save + fsync / put + sync: {(peer['save'] + peer['sync']) / (ours['put'] + ours['sync']):.2f}",
    ]


def residents_side(count: int) -> Callable[[Path, str], Step]:
    """Puts into a store that holds so many samples already."""

    def make(directory: Path, mode: str) -> Step:
        from specforge_core.contracts import Sample

        store, sample = open_store(directory), Sample("p", 0, make_features(mode))
        for number in range(count):
            store.put(f"resident{number}.e0", sample)
        store.sync()

        def step() -> dict[str, float]:
            refs = []
            put = timed(lambda: refs.extend(store.put(f"p{number}.e0", sample) for number in range(PUTS)))
            delete = timed(lambda: [store.delete(ref) for ref in refs])
            return {"put": put / PUTS, "delete": delete / PUTS, "usage": timed(store.usage)}

        return step

    return make


def show_residents(found: Mapping[str, Times]) -> list[str]:
    empty, full = found["none resident"], found[f"{RESIDENT} resident"]
    return [
        _parts(found),
        *(f"{part} with {RESIDENT} resident / with none: {full[part] / empty[part]:.2f}" for part in empty),
    ]


def vouched_side(directory: Path, mode: str) -> Step:
    """With a token, the store's bytes are signed with their refs. The digest alone, and a copy of the same bytes."""
    from specforge_core import VouchedStore
    from specforge_core.contracts import Sample
    from specforge_core.features.contents import digest_features

    store, sample = VouchedStore(open_store(directory)), Sample("p", 0, make_features(mode))
    number = 0

    def step() -> dict[str, float]:
        nonlocal number
        number += 1
        refs = []
        seconds = {
            "put": timed(lambda: refs.append(store.put(f"p{number}.e0", sample))),
            "get": timed(lambda: store.get(refs[0])),
            "digest": timed(lambda: digest_features(sample.features)),
            "copy": timed(lambda: {name: tensor.clone() for name, tensor in sample.features.items()}),
        }
        store.delete(refs[0])
        return seconds

    return step


def show_vouched(found: Mapping[str, Times]) -> list[str]:
    vouched, plain = found["signed bytes"], found["unsigned bytes"]
    both = vouched["put"] + vouched["get"]
    return [
        _parts(found),
        f"put + get, signed / unsigned: {both / (plain['put'] + plain['get']):.2f}; "
        f"the digests' share of it: {2 * vouched['digest'] / both:.2f}",
        f"digest / copy of the same bytes in memory: {vouched['digest'] / vouched['copy']:.2f}",
    ]


SECTIONS: dict[str, Section] = {
    "file-store": Section(
        "one sample put into the file store and got, against safetensors' save and load of the same tensors",
        tuple(TOKENS),
        {"file store": file_store_side, "safetensors": safetensors_side},
        show_file_store,
    ),
    "signed-bytes": Section(
        "one sample put into the file store and got, with its bytes signed and without",
        tuple(TOKENS),
        {"signed bytes": vouched_side, "unsigned bytes": file_store_side},
        show_vouched,
    ),
    "residents": Section(
        "a small sample put into a file store that holds others",
        ("small",),
        {"none resident": residents_side(0), f"{RESIDENT} resident": residents_side(RESIDENT)},
        show_residents,
    ),
}


def report_file_channel(directory: Path, rounds: int) -> list[str]:
    return channels.describe(channels.compare_files(directory))


def report_redis_channel(directory: Path, rounds: int) -> list[str]:
    return channels.describe(channels.compare_redis())


def report_mooncake(directory: Path, rounds: int) -> list[str]:
    return [str(figures) for figures in mooncake_store.figures(3 * rounds)]


REPORTS: dict[str, Callable[[Path, int], list[str]]] = {
    "file-channel": report_file_channel,
    "redis-channel": report_redis_channel,
    "mooncake-store": report_mooncake,
}
ON_DISK_OR_NOT = ("file-store", "signed-bytes", "residents", "file-channel")


def _parts(found: Mapping[str, Times]) -> str:
    return "; ".join(
        f"{side}: " + ", ".join(f"{part} {1e3 * seconds:.3g} ms" for part, seconds in times.items())
        for side, times in found.items()
    )


def work(side: str, directory: Path) -> None:
    """A worker: reads a section and a mode per line, does the side's step once, and answers with one JSON line."""
    import torch

    torch.set_num_threads(1)
    steps: dict[str, Step] = {}
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        section, mode = json.loads(line)
        if line not in steps:
            place = Path(tempfile.mkdtemp(dir=directory))
            steps[line] = SECTIONS[section].sides[side](place, mode)
        print(json.dumps(steps[line]()), flush=True)


def measure(name: str, mode: str, rounds: int) -> dict[str, Times]:
    """Medians of every part of every side; the first two rounds warm up."""
    sides = [Side.start(side, sys.executable, __file__) for side in SECTIONS[name].sides]
    found: dict[str, list[Times]] = {side.name: [] for side in sides}
    for turn in range(2 + rounds):
        for side in sides:
            times = side.ask(json.dumps([name, mode]))
            if turn >= 2:
                found[side.name].append(times)
    for side in sides:
        side.process.stdin.close()
        side.process.wait(timeout=60)
    return {
        side: {part: statistics.median(t[part] for t in times) for part in times[0]} for side, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join([*SECTIONS, *REPORTS])}; default: all"
    )
    parser.add_argument("--directory", type=Path, action="append", help="where to write; default: memory, then disk")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.scratch)
        return
    known = [*SECTIONS, *REPORTS]
    unknown = set(options.sections) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; sections are {', '.join(known)}")
    say_whether_quiet()
    places = options.directory or [Path("/dev/shm"), Path(tempfile.gettempdir())]
    for name in options.sections or known:
        for directory in places if name in ON_DISK_OR_NOT else places[:1]:
            with tempfile.TemporaryDirectory(prefix="wires-", dir=directory) as scratch:
                show(name, Path(scratch), rounds=options.rounds)


def show(name: str, scratch: Path, *, rounds: int) -> None:
    """Measure and print one section."""
    if name in REPORTS:
        print(f"{name} (in {scratch.parent})", flush=True)
        for line in REPORTS[name](scratch, rounds):
            print(f"  {line}", flush=True)
        return
    sys.argv[1:] = ["--scratch", str(scratch)]  # what the workers are started with
    for mode in SECTIONS[name].modes:
        print(f"{SECTIONS[name].title} ({mode}, in {scratch.parent})", flush=True)
        for line in SECTIONS[name].show(measure(name, mode, rounds)):
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
