# SPDX-License-Identifier: Apache-2.0
"""What a run left behind, read for its report. First of the report's three steps: read, draw, write the page.

A line that a crash cut short is ignored at the end of a log; anywhere else it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specforge_core.contracts import DataError
from specforge_core.contracts.files import open_regular, parse_json, read_bytes, read_json_object
from specforge_core.contracts.kinds import (
    FLAG,
    Kind,
    find_wrong,
    list_of,
    number,
    object_of,
    or_null,
    shorten,
    whole_number,
)

Row = Mapping[str, Any]

MAX_TEXT_BYTES = 256 << 10
"""The longest config.yaml or provenance.json that goes into a page: ours have some ten kilobytes, and YAML is read at
a few hundred kilobytes a second."""
MAX_FACTS, MAX_FACT_LENGTH = 64, 4096
"""What stands below a bench: ours has six, the longest a path."""
MAX_LINE_BYTES = 1 << 20
"""The longest line of a log: ours have some hundred bytes."""
MAX_ROWS = 1_000_000
"""The most lines of a log: a line is an optimizer step, and runs have some ten thousand."""
LARGEST = 1e30
"""The largest number that is drawn: beyond it matplotlib's own arithmetic overflows."""

_COUNT = whole_number(0, 1 << 53)
_MEASURED = or_null(number(0, 1e15))
_BOTH_WAYS = object_of({"decode": _MEASURED, "with_prefill": _MEASURED})
_BENCH: Mapping[str, Kind] = {
    "lossless": FLAG,
    "acceptance_length": _MEASURED,
    "acceptance_rate": _MEASURED,
    "position_acceptance": list_of(or_null(number(0, 1)), most=1024),
    "speedup": _BOTH_WAYS,
    "tokens_per_second": object_of({"plain": _BOTH_WAYS, "speculative": _BOTH_WAYS}),
    **dict.fromkeys(("prompts", "new_tokens", "draft_tokens"), _COUNT),
    "facts": Kind("an object of short texts and numbers", lambda value: _are_facts(value)),
}


def _are_facts(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_FACTS
        and all(type(fact) in (str, int, float) for fact in value.values())
        and all(len(str(text)) <= MAX_FACT_LENGTH for entry in value.items() for text in entry)
    )


_ANEW = "remove it, or write it again"
_CONFIG_AGAIN = "`specforge train` with the run file writes it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecords:
    """The contents of a run directory, as far as it exists.

    :param config: the resolved run file as it stands there.
    :param names: what it calls strategy, target engine and topology.
    :param provenance: ``provenance.json`` as it stands there.
    """

    name: str
    steps: tuple[Row, ...]
    evaluations: tuple[Row, ...]
    bench: Row | None
    config: str
    names: Mapping[str, str]
    provenance: str | None


def read_run(directory: Path) -> RunRecords:
    """Read a run directory.

    :raises DataError: it is no run, or a file in it is damaged.
    """
    path = directory / "config.yaml"
    if not os.path.lexists(path):
        raise DataError(
            "this directory is no run: it holds no config.yaml",
            where=str(directory),
            hint="name the run.directory of a run that was started",
        )
    config = _read_text(path, hint=_CONFIG_AGAIN)
    return RunRecords(
        name=directory.resolve().name,
        steps=read_lines(directory / "metrics.jsonl"),
        evaluations=read_lines(directory / "evaluations.jsonl"),
        bench=_read_bench(directory / "bench.json"),
        config=config,
        names=_read_names(config, path),
        provenance=_read_provenance(directory / "provenance.json"),
    )


def _read_text(path: Path, *, hint: str) -> str:
    try:
        return read_bytes(path, limit=MAX_TEXT_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", where=str(path), hint=hint) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", where=str(path), hint=hint) from error


class _PlainLoader(yaml.BaseLoader):
    """YAML whose scalars are texts and which has no aliases: nothing is constructed, nothing is spelt out twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "a resolved run file has no aliases", mark)
        return super().compose_node(parent, index)


def _read_names(text: str, path: Path) -> dict[str, str]:
    """What a resolved run file calls strategy, target engine and topology."""
    try:
        config = _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape of no character
        raise DataError(f"not readable as YAML: {error}", where=str(path), hint=_CONFIG_AGAIN) from error
    except RecursionError as error:
        raise DataError("not readable as YAML: nested too deeply", where=str(path), hint=_CONFIG_AGAIN) from error
    if not isinstance(config, dict):
        raise DataError("the resolved run file is not a mapping", where=str(path), hint=_CONFIG_AGAIN)
    sections = {key: config[key] for key in ("strategy", "target") if isinstance(config.get(key), dict)}
    found = {key: section.get("name") for key, section in sections.items()} | {"topology": config.get("topology")}
    return {key: name for key, name in found.items() if isinstance(name, str)}


def read_lines(path: Path) -> tuple[Row, ...]:
    """The rows of a log; none where there is no file.

    :raises DataError: naming the line that is damaged.
    """
    if not os.path.lexists(path):
        return ()
    rows = []
    for line_number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{line_number}"
        if len(line) > MAX_LINE_BYTES or line_number > MAX_ROWS:
            limit = f"line of {MAX_LINE_BYTES} bytes" if len(line) > MAX_LINE_BYTES else f"log of {MAX_ROWS} lines"
            raise DataError(f"longer than the longest {limit}", where=where, hint=_ANEW)
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if not line.endswith(b"\n"):  # the last: the writer was cut off
                break
            raise DataError("this line is damaged", where=where, hint="remove the line") from error
        rows.append(_check_row(row, where))
    return tuple(rows)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, each with its end; of one that is too long only the beginning."""
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                yield line
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", where=str(path), hint=_ANEW) from error


def _check_row(row: object, where: str) -> Row:
    if not isinstance(row, dict) or not _COUNT.accepts(row.get("step")):
        raise DataError("this line is no record of a step", where=where, hint="remove the line")
    wrong = [key for key, value in row.items() if value is not None and type(value) not in (int, float)]
    if wrong:
        raise DataError(f"{shorten(wrong[0])} is no number", where=where, hint="remove the line")
    return row


def series(rows: tuple[Row, ...], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, where it was counted and can be drawn."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None and abs(row[name]) <= LARGEST]
    return [step for step, _ in found], [float(value) for _, value in found]


def _read_bench(path: Path) -> Row | None:
    if not os.path.lexists(path):
        return None
    content = read_json_object(path, refuse=lambda reason: DataError(reason, where=str(path), hint=_ANEW))
    missing = [key for key in _BENCH if key not in content]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}", where=str(path), hint=_ANEW)
    wrong = find_wrong(content, _BENCH)
    if wrong is not None:
        raise DataError(wrong[1], where=f"{path}: {wrong[0]}", hint=_ANEW)
    return content


def _read_provenance(path: Path) -> str | None:
    if not os.path.lexists(path):
        return None
    text = _read_text(path, hint=_ANEW)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=str(path), hint=_ANEW) from error
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path), hint=_ANEW)
    return text
