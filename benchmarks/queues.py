# SPDX-License-Identifier: Apache-2.0
"""The queue of capture work in a directory with many workers: batches and refs per second, and bytes per ref.

Every worker is a queue of its own, as a process would have it, in a few processes. A batch costs two short locked
appends (taken, finished) and one of the worker's own file.

    python benchmarks/queues.py [--workers 64] [--batches 4000] [--refs 32] [--directory DIR ...]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path

from quiet import say_whether_quiet
from specforge_core.channel.file_queue import FileQueue
from specforge_core.contracts import CaptureBatch, CaptureRequest, SampleRef, sample_id

PROCESSES = 4
TIMEOUT_SECONDS = 60.0


def make_refs(batch: CaptureBatch, generation: int) -> list[SampleRef]:
    request = CaptureRequest(aux_layer_ids=(1, 17, 32), last_hidden_norm="post", dtype="bfloat16")
    refs = []
    for place in range(batch.first, batch.first + batch.count):
        tokens, name = 100 + place * 37 % 1900, f"sharegpt-{place:07d}"
        refs.append(SampleRef(sample_id(name, 0), generation, "any", request.specs(tokens, 4096), tokens, name, 0))
    return refs


def work(directory: Path, name: str) -> None:
    queue = FileQueue(directory, timeout_seconds=TIMEOUT_SECONDS)
    member = queue.join(name)
    while (lease := queue.take(name, 1.0)) is not None:
        assert queue.finish(lease, make_refs(lease.batch, lease.number))
    member.close()
    queue.close()


def work_in_threads(directory: Path, names: list[str]) -> None:
    threads = [threading.Thread(target=work, args=(directory, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(directory: Path, *, workers: int, batches: int, refs: int) -> None:
    queue = FileQueue(directory, timeout_seconds=TIMEOUT_SECONDS)
    began = time.perf_counter()
    queue.offer([CaptureBatch(split="train", epoch=0, first=refs * n, count=refs) for n in range(batches)])
    offered = time.perf_counter() - began
    names = [f"w{number}" for number in range(workers)]
    shares = [names[part::PROCESSES] for part in range(min(PROCESSES, workers))]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work_in_threads, args=(directory, share)) for share in shares]
    for process in processes:
        process.start()
    position, read, first = 0, 0.0, 0.0
    while position < batches:
        begun = time.perf_counter()
        found = queue.results(position, 5.0).results
        if found:
            first = first or begun
            position = found[-1].position
    seconds = time.perf_counter() - first
    for process in processes:
        process.join()
    begun, position = time.perf_counter(), 0
    while found := queue.results(position, 0.0).results:
        position = found[-1].position
    read = time.perf_counter() - begun
    nbytes = sum(path.stat().st_size for path in directory.iterdir())
    queue.close()
    print(
        f"{workers} workers, {batches:,} batches of {refs} refs in {directory.parent}: offered in {offered:.2f} s; "
        f"{batches / seconds:,.0f} batches/s, {batches * refs / seconds:,.0f} refs/s finished; "
        f"{batches * refs / read:,.0f} refs/s read; {nbytes / batches / refs:.0f} bytes per ref",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--batches", type=int, default=4000)
    parser.add_argument("--refs", type=int, default=32)
    parser.add_argument("--directory", type=Path, nargs="*", default=[Path("/dev/shm"), Path.cwd()])
    options = parser.parse_args()
    say_whether_quiet()
    for place in options.directory:
        for workers in options.workers:
            with tempfile.TemporaryDirectory(dir=place, prefix="queue-") as directory:
                measure(Path(directory) / "q", workers=workers, batches=options.batches, refs=options.refs)


if __name__ == "__main__":
    main()
