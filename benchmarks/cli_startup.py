# SPDX-License-Identifier: Apache-2.0
"""What starting the command costs, as a ratio to ``python -c "import typer, pydantic"`` on the same machine.

    python benchmarks/cli_startup.py [--rounds 15] [--limit 1.5]

Rounds alternate, so that load falls on every command alike; the smallest time of each is compared. Exits 1 where a
ratio is above the limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from quiet import say_whether_quiet

BASELINE = [sys.executable, "-c", "import typer, pydantic"]
SPECFORGE = [sys.executable, "-m", "specforge_core.cli.main"]
COMMANDS = {"specforge --help": [*SPECFORGE, "--help"], "specforge plugins": [*SPECFORGE, "plugins"]}


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--limit", type=float, default=1.5)
    options = parser.parse_args()
    say_whether_quiet()
    commands = {"import typer, pydantic": BASELINE, **COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            times[name].append(seconds(command))
    baseline = min(times["import typer, pydantic"])
    for name, measured in times.items():
        print(f"{name:<24} {1000 * min(measured):6.0f} ms  {min(measured) / baseline:.2f}")
    if any(min(times[name]) > options.limit * baseline for name in COMMANDS):
        sys.exit(1)


if __name__ == "__main__":
    main()
