# SPDX-License-Identifier: Apache-2.0
"""The demo of every named strategy on the same target, and one table of what came out.

    python benchmarks/compare_strategies.py [--strategies eagle3 dflash domino] [--directory runs]

Each demo captures, trains, exports and benches as ``specforge demo STRATEGY`` does; the target is made once and kept in
the cache. Speeds are of this machine and this tiny target: compare strategies with them, not servers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def run_demo(strategy: str, directory: Path) -> dict:
    """Run one demo and return what it measured."""
    command = [sys.executable, "-m", "specforge_core.cli.main", "demo", strategy, "--directory", str(directory)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    bench = json.loads((directory / "bench.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    bench["training_seconds"] = sum(line["seconds"] + line["waited_seconds"] for line in lines)
    bench["training_tokens"] = sum(line["tokens"] for line in lines)
    return bench


def tabulate(results: dict[str, dict]) -> Table:
    table = Table(title="strategies on the demo's target")
    for column in ("measured", *results):
        table.add_column(column, justify="left" if column == "measured" else "right")
    rows = {
        "output identical": lambda r: "yes" if r["lossless"] else "NO",
        "acceptance length τ": lambda r: f"{r['acceptance_length']:.2f}",
        "accepted at position 1, 2, …": lambda r: " ".join(f"{rate:.2f}" for rate in r["position_acceptance"]),
        "draft tokens per pass": lambda r: str(r["draft_tokens"]),
        "tokens/s, plain decode": lambda r: f"{r['tokens_per_second']['plain']['decode']:.0f}",
        "tokens/s, speculative": lambda r: f"{r['tokens_per_second']['speculative']['decode']:.0f}",
        "speed-up": lambda r: f"{r['speedup']['decode']:.2f}×",
        "draft parameters": lambda r: f"{r['facts']['draft_parameters']:,}",
        "training seconds": lambda r: f"{r['training_seconds']:.0f}",
        "training tokens": lambda r: f"{r['training_tokens']:,}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(result) for result in results.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["eagle3", "dflash", "domino"])
    parser.add_argument("--directory", type=Path, default=Path("runs"))
    options = parser.parse_args()
    results = {name: run_demo(name, options.directory / f"compare-{name}") for name in options.strategies}
    Console(width=110).print(tabulate(results))


if __name__ == "__main__":
    main()
