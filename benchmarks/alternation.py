# SPDX-License-Identifier: Apache-2.0
"""Two sides of a benchmark, alternating in one run: each is a process that waits while the other works.

A benchmark script describes itself with :class:`StepBenchmark` and calls :func:`run`. The script is started again, with
``--worker NAME``, once per side and mode, so that peak memory is the mode's own; the peer's worker runs in its own
environment, where this module needs torch and the standard library only.

On CUDA, seconds are taken between two synchronisations, peak memory is the card's, and the rate that products are
compared with is that of large products on this card.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quiet import say_whether_quiet

Step = Callable[[str], float]
"""One training step in a mode; gives its loss."""


@dataclass(frozen=True)
class StepBenchmark:
    """What is compared.

    :param script: the benchmark's own file.
    :param sides: makes each side's step, ``ours`` and, where there is one, ``peer``.
    """

    script: str
    title: str
    modes: tuple[str, ...]
    tokens_per_step: Callable[[argparse.Namespace], int]
    sides: Mapping[str, Callable[[argparse.Namespace], Step]]


def run(benchmark: StepBenchmark, parser: argparse.ArgumentParser) -> None:
    """Parse the command line, with the benchmark's own arguments already in ``parser``, and measure every mode."""
    parser.add_argument("--peer-python", help="python of the environment that holds speculators; default: ours alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", action="store_true", help="also print which operators of ours take the time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--mode", choices=benchmark.modes, action="append")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(benchmark.sides[options.worker], options)
        return
    say_whether_quiet()
    results = []
    for mode in options.mode or benchmark.modes:
        results.append(measure(benchmark, mode, options))
        show(benchmark, results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def work(make: Callable[[argparse.Namespace], Step], options: argparse.Namespace) -> None:
    """A worker: reads a mode per line, with what to find out, and answers with one JSON line."""
    import torch

    torch.set_num_threads(options.threads)
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(options)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        mode, _, what = line.strip().partition(" ")
        answer: dict = {}
        if what == "flops":
            answer["flops"] = count_flops(step, mode)
        elif what == "gemm":
            answer["gflops"] = measure_gemm(options)
        elif what == "profile":
            answer["profile"] = profile(step, mode, options)
        else:
            begin = time.perf_counter()
            answer["loss"] = step(mode)
            synchronize(options)
            answer["seconds"] = time.perf_counter() - begin
        print(json.dumps({**answer, "peak_mb": peak_mb(options), "imports_mb": imports / 1024}), flush=True)


def synchronize(options: argparse.Namespace) -> None:
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()


def peak_mb(options: argparse.Namespace) -> float:
    """Of the process; on CUDA, what the allocator had in use on the card."""
    import torch

    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def count_flops(step: Step, mode: str) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(mode)
    return counter.get_total_flops()


def measure_gemm(options: argparse.Namespace) -> float:
    """GFLOP/s of the machine's own square products, the best of five."""
    import torch

    size = 8192 if options.device == "cuda" else 2048
    a = torch.randn(size, size, dtype=getattr(torch, options.dtype), device=options.device)
    times = []
    for _ in range(5):
        synchronize(options)
        begin = time.perf_counter()
        a @ a
        synchronize(options)
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times) / 1e9


def profile(step: Step, mode: str, options: argparse.Namespace) -> str:
    """A table of the operators (on CUDA: kernels) that took most of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with record(activities=kinds) as found:
        step(mode)
        synchronize(options)
    order = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)


@dataclass
class Side:
    """One worker process."""

    name: str
    process: subprocess.Popen

    @classmethod
    def start(cls, name: str, python: str, script: str) -> Side:
        command = [python, script, *sys.argv[1:], "--worker", name]
        side = cls(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        side._answer()
        return side

    def ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}; its error stands above")
        return json.loads(line)


def measure(benchmark: StepBenchmark, mode: str, options: argparse.Namespace) -> dict:
    """Alternate the sides in one mode; medians over the rounds."""
    sides = [Side.start("ours", sys.executable, benchmark.script)]
    if options.peer_python and "peer" in benchmark.sides:
        sides.append(Side.start("peer", options.peer_python, benchmark.script))
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    gflops = sides[0].ask(f"{mode} gemm")["gflops"]
    result: dict = {"mode": mode, "dtype": options.dtype, "device": device_name(options), "gflops": gflops}
    for turn in range(options.warmup + options.rounds):
        for side in sides:
            answer = side.ask(mode)
            if turn >= options.warmup:
                seconds[side.name].append(answer["seconds"])
            result[f"{side.name}_peak_mb"], result[f"{side.name}_imports_mb"] = answer["peak_mb"], answer["imports_mb"]
            result.setdefault(f"{side.name}_first_loss", answer["loss"])
            result[f"{side.name}_last_loss"] = answer["loss"]
    for side in sides:
        median = statistics.median(seconds[side.name])
        result[f"{side.name}_tokens_per_second"] = benchmark.tokens_per_step(options) / median
        result[f"{side.name}_gemm_share"] = side.ask(f"{mode} flops")["flops"] / median / 1e9 / result["gflops"]
        if options.profile and side.name == "ours":
            print(side.ask(f"{mode} profile")["profile"])
        side.process.stdin.close()
        side.process.wait(timeout=60)
    return result


def device_name(options: argparse.Namespace) -> str:
    import torch

    return torch.cuda.get_device_name() if options.device == "cuda" else "cpu"


def show(benchmark: StepBenchmark, result: dict) -> None:
    print(
        f"{benchmark.title}, {result['dtype']}, {result['mode']} positions trained "
        f"({result['device']}: {result['gflops']:.0f} GFLOP/s in square products)"
    )
    for side in ("ours", "peer"):
        if f"{side}_peak_mb" in result:
            print(
                f"  {side}: {result[f'{side}_tokens_per_second']:7.0f} tokens/s,"
                f" products at {result[f'{side}_gemm_share']:.0%} of that rate,"
                f" peak {result[f'{side}_peak_mb']:.0f} MB (imports {result[f'{side}_imports_mb']:.0f}),"
                f" loss {result[f'{side}_first_loss']:.4f} -> {result[f'{side}_last_loss']:.4f}"
            )
    if "peer_peak_mb" in result:
        speed = result["ours_tokens_per_second"] / result["peer_tokens_per_second"]
        print(f"  ratio: {speed:.2f} x tokens/s, {result['ours_peak_mb'] / result['peer_peak_mb']:.2f} x peak memory")
