# SPDX-License-Identifier: Apache-2.0
"""What preparing prompts counted, and what ``plan`` sees of the data, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from specforge_core.cli.text_table import format_bytes, format_table
from specforge_core.contracts.redaction import visible

_SHOWN_SOURCES = 30
"""A folder of shards has hundreds; the last line counts them all."""
_COLUMNS = ("source", "rows", "samples", "tokens", "trained", "cut", "dropped", "rejected", "p50", "p90", "p99", "max")


def render_report(split: str, described: Mapping[str, Any]) -> str:
    """A table of sources, what was counted, and warnings in words."""
    from specforge_core.prompts.report import COUNTS

    sources, total = described["sources"], described["total"]
    rows = [_row(report) for report in sources[:_SHOWN_SOURCES]]
    if len(sources) > 1:
        rows.append(_row(total))
    lines = [f"{split}: {described['directory']}", "", format_table(_COLUMNS, rows)]
    if len(sources) > _SHOWN_SOURCES:
        lines.append(f"and {len(sources) - _SHOWN_SOURCES} more sources, counted in the last line")
    if total["counts"]:
        counted = [(name.replace("_", " "), str(count), COUNTS[name]) for name, count in total["counts"].items()]
        lines += ["", format_table(("counted", "", "what it is"), counted)]
    lines += ["", *_warnings(described)]
    return visible("\n".join(lines))


def _row(report: Mapping[str, Any]) -> tuple[str, ...]:
    share = f" ({100 * report['trained_tokens'] / report['tokens']:.0f} %)" if report["tokens"] else ""
    return (
        report["name"],
        str(report["rows"]),
        str(report["samples"]),
        str(report["tokens"]),
        f"{report['trained_tokens']}{share}",
        str(report["counts"].get("cut", 0)),
        str(report["dropped"]),
        str(sum(report["rejected"].values())),
        *(str(report["lengths"].get(name, "-")) for name in ("p50", "p90", "p99", "max")),
    )


def _warnings(described: Mapping[str, Any]) -> Iterator[str]:
    from specforge_core.prompts.report import warnings_of

    if len(described["sources"]) == 1 or len(described["warnings"]) > _SHOWN_SOURCES:
        said = {"": warnings_of(described["total"])}
    else:
        said = described["warnings"]
    for name, warnings in said.items():
        for warning in warnings:
            yield f"warning: {f'{name}: ' if name else ''}{warning}"
    if not any(said.values()):
        yield "nothing to warn of"


def render_outlook(split: str, outlook: Mapping[str, Any]) -> Iterator[str]:
    """Lines for ``plan``."""
    prepared = outlook["prepared"]
    state = "not prepared yet" if prepared is None else f"{prepared} prompts are prepared"
    yield f"prompts    {split}: {state}"
    for source in outlook["sources"]:
        said = [source["format"]] if "format" in source else []
        said += [format_bytes(source["bytes"])] if "bytes" in source else []
        first = [f"{count} x {kind}" for kind, count in source.get("first_rows", {}).items()]
        said += [f"first rows: {', '.join(first)}"] if first else []
        said += [f"problem: {source['problem']}"] if "problem" in source else []
        yield visible(f"           {source['name']}: {'; '.join(said)}")
    if outlook.get("more_sources"):
        yield f"           and {outlook['more_sources']} more files"
