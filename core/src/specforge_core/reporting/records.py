# SPDX-License-Identifier: Apache-2.0
"""What a run left behind, read for its report. First of the report's three steps: read, draw, write the page.

A line that a crash cut short is ignored at the end of a log; anywhere else it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specforge_core.contracts import DataError

Row = Mapping[str, Any]

_BENCH_KEYS = (
    *("acceptance_length", "acceptance_rate", "position_acceptance", "lossless", "speedup", "tokens_per_second"),
    *("prompts", "new_tokens", "draft_tokens", "facts"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """The contents of a run directory, as far as it exists."""

    name: str
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    bench: Row | None
    config: Row
    provenance: Row | None


def read_run(directory: Path) -> RunRecords:
    """Read a run directory.

    :raises DataError: it is no run, or a file in it is damaged.
    """
    if not (directory / "config.yaml").is_file():
        raise DataError(
            "this directory is no run: it holds no config.yaml",
            where=str(directory),
            hint="name the run.directory of a run that was started",
        )
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"not readable as YAML: {error}", where=str(directory / "config.yaml"), hint=_CONFIG_AGAIN
        ) from error
    if not isinstance(config, dict):
        raise DataError(
            "the resolved run file is not a mapping", where=str(directory / "config.yaml"), hint=_CONFIG_AGAIN
        )
    return RunRecords(
        name=directory.resolve().name,
        steps=read_lines(directory / "metrics.jsonl"),
        evaluations=read_lines(directory / "evaluations.jsonl"),
        bench=_read_bench(directory / "bench.json"),
        config=config,
        provenance=_read_json(directory / "provenance.json"),
    )


_CONFIG_AGAIN = "`specforge train` with the run file writes it again"


def read_lines(path: Path) -> tuple[Row, ...]:
    """The rows of a log; none where there is no file."""
    if not path.is_file():
        return ()
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the writer was cut off
                break
            raise DataError("this line is damaged", where=f"{path}:{number}", hint="remove the line") from error
        if not isinstance(row, dict) or "step" not in row:
            raise DataError("this line is no record of a step", where=f"{path}:{number}", hint="remove the line")
        wrong = [key for key, value in row.items() if value is not None and not isinstance(value, (int, float))]
        if wrong:
            raise DataError(f"{wrong[0]} is no number", where=f"{path}:{number}", hint="remove the line")
        rows.append(row)
    return tuple(rows)


def series(rows: tuple[Row, ...], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was counted."""
    found = [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _read_bench(path: Path) -> Row | None:
    content = _read_json(path)
    missing = [] if content is None else [key for key in _BENCH_KEYS if key not in content]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}", where=str(path), hint="remove it, or write it again")
    return content


def _read_json(path: Path) -> Row | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("damaged: not JSON", where=str(path), hint="remove it, or write it again") from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), hint="remove it, or write it again")
    return content
