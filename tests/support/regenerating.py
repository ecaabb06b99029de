# SPDX-License-Identifier: Apache-2.0
"""Regeneration as processes that are killed and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "regenerate_once.py"


def write_talks(path: Path, count: int, *, rounds: int = 2) -> Path:
    """Conversations of so many rounds, each with a text of its own."""
    with path.open("w") as out:
        for number in range(count):
            messages = []
            for turn in range(1 + number % rounds):
                messages.append({"role": "user", "content": f"question {number}.{turn} target checks tokens"})
                messages.append({"role": "assistant", "content": "somebody else's answer"})
            out.write(json.dumps({"id": f"talk-{number}", "messages": messages}) + "\n")
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a set."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def read_answers(directory: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(directory.glob("answers-*.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


class Forks:
    """One process after the other, each a fork of one that has imported everything."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self) -> int:
        """Begin one; returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._line()

    def wait(self) -> int:
        """The exit status of the one that was begun; negative where a signal ended it."""
        return self._line()

    def _line(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return int(line)


@contextmanager
def forks(*arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> Iterator[Forks]:
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(
        command, cwd=cwd, env=given, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
    ) as process:
        try:
            yield Forks(process)
        finally:
            process.kill()
