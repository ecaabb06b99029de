# SPDX-License-Identifier: Apache-2.0
"""What a run left behind, read for its report. First of the report's three steps: read, draw, write the page.

A run may have been received: its files are damaged or hostile until they are checked, here and only here. What the
page shows as it is (configuration, provenance) stays text; numbers that are drawn are numbers of a size that can be.
A line that a crash cut short is ignored at the end of a log; anywhere else it is an error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specforge_core.contracts import DataError
from specforge_core.contracts.files import MAX_JSON_DEPTH, open_regular, parse_json, read_bytes, read_json_object

MAX_TEXT_BYTES = 256 << 10
"""The longest config.yaml or provenance.json: both have a few kilobytes, and the page shows all of it. PyYAML reads
some 100 kB a second."""

MAX_BENCH_BYTES = 16 << 20
"""The longest bench.json: ten thousand prompts take some three megabytes."""

MAX_LINE_BYTES = 256 << 10
"""The longest line of a log: several thousand metrics. Ours have some twenty."""

MAX_POSITIONS = 128
"""Draft positions that a picture can show; drafts propose some sixteen tokens at most."""

LARGEST = 1e30
"""No measurement is larger, and sums, squares and axes of such numbers are still finite."""

LARGEST_COUNT = 2**53
"""Steps and tokens up to here are exact as floating-point numbers, which pictures are drawn with."""

Row = Mapping[str, float]
Measured = Annotated[float, Field(ge=-LARGEST, le=LARGEST)] | None
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class _Kinds(BaseModel):
    """What stands in a file, of exactly these kinds; further keys are not read."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class Speeds(_Kinds):
    decode: Measured
    with_prefill: Measured


class SpeedOfSides(_Kinds):
    plain: Speeds
    speculative: Speeds


class Bench(_Kinds):
    """The part of ``bench.json`` that is shown."""

    lossless: bool
    acceptance_length: Measured
    acceptance_rate: Measured
    position_acceptance: Annotated[list[Measured], Field(max_length=MAX_POSITIONS)]
    prompts: Count
    new_tokens: Count
    draft_tokens: Count
    tokens_per_second: SpeedOfSides
    speedup: Speeds
    facts: dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """The contents of a run directory, as far as it exists.

    :param config: the resolved run file, as it stands there; likewise ``provenance``.
    :param parts: names of strategy, target engine and topology.
    """

    name: str
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    bench: Bench | None
    config: str
    parts: Mapping[str, str]
    provenance: str | None


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
    config = _read_text(directory / "config.yaml", hint=_CONFIG_AGAIN)
    return RunRecords(
        name=directory.resolve().name,
        steps=read_lines(directory / "metrics.jsonl"),
        evaluations=read_lines(directory / "evaluations.jsonl"),
        bench=_read_bench(directory / "bench.json"),
        config=config,
        parts=_read_parts(config, str(directory / "config.yaml")),
        provenance=_read_provenance(directory / "provenance.json"),
    )


_CONFIG_AGAIN = "`specforge train` with the run file writes it again"
_AGAIN = "remove it, or write it again"


def _read_parts(config: str, where: str) -> dict[str, str]:
    """Every scalar is read as text: nothing of a configuration is needed but three names."""
    try:
        problem = _find_problem(config)
        values = None if problem else yaml.BaseLoader(config).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: of an escape, "\\UFFFFFFFF"
        problem = str(error)
    if problem:
        raise DataError(f"not readable as YAML: {problem}", where=where, hint=_CONFIG_AGAIN)
    if not isinstance(values, dict):
        raise DataError("the resolved run file is not a mapping", where=where, hint=_CONFIG_AGAIN)
    names = {key: section.get("name") for key in ("strategy", "target") if isinstance(section := values.get(key), dict)}
    names["topology"] = values.get("topology")
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _find_problem(config: str) -> str | None:
    """Looks at events, one by one: nothing is made of a document before it is known to be flat and free of aliases."""
    depth = 0
    for event in yaml.parse(config, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.AliasEvent):
            return "it holds an alias, which no resolved run file has"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_JSON_DEPTH:
            return "nested too deeply"
    return None


def _read_text(path: Path, *, hint: str) -> str:
    try:
        return read_bytes(path, limit=MAX_TEXT_BYTES).decode()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise DataError("not readable as text: not UTF-8", where=str(path), hint=hint) from error


def read_lines(path: Path) -> tuple[Row, ...]:
    """The rows of a log; none where there is no file.

    :raises DataError: it cannot be read, or a line is no record of a step.
    """
    if not os.path.lexists(path):
        return ()
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            lines = enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1)
            rows = [_read_line(line, f"{path}:{number}") for number, line in lines]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), hint=_AGAIN) from error
    return tuple(row for row in rows if row is not None)


def _read_line(line: bytes, where: str) -> Row | None:
    """None for a line without content, and for one whose writer was cut off."""

    def refuse(reason: str) -> DataError:
        return DataError(reason, where=where, hint="remove the line")

    if len(line) > MAX_LINE_BYTES:
        raise refuse(f"this line is longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return None
    try:
        row = parse_json(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            return None
        raise refuse("this line is damaged") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] <= LARGEST_COUNT:
        raise refuse("this line is no record of a step")
    for key, value in row.items():
        if value is not None and not _is_number(value):
            raise refuse(f"{key!r:.100} is no number that can be shown")
    return row


def _is_number(value: object) -> bool:
    """NaN and infinity are numbers: a draft that diverged is evaluated as that."""
    if isinstance(value, float) and not math.isfinite(value):
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def series(rows: tuple[Row, ...], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was counted and is finite."""
    found = [
        (int(row["step"]), float(value))
        for row in rows
        if (value := row.get(name)) is not None and math.isfinite(value)
    ]
    return [step for step, _ in found], [value for _, value in found]


def _read_bench(path: Path) -> Bench | None:
    if not os.path.lexists(path):
        return None
    content = read_json_object(path, refuse=_refuse_file(path), limit=MAX_BENCH_BYTES)
    try:
        return Bench.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        [(key, message)] = [(problem["loc"], problem["msg"]) for problem in problems[:1]]
        named = ".".join(str(part) for part in key)
        raise DataError(message, where=f"{path}: {named!s:.100}", hint=_AGAIN) from error


def _read_provenance(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    read_json_object(path, refuse=_refuse_file(path), limit=MAX_TEXT_BYTES)
    return _read_text(path, hint=_AGAIN)


def _refuse_file(path: Path) -> Callable[[str], DataError]:
    return lambda reason: DataError(f"damaged: {reason}", where=str(path), hint=_AGAIN)
