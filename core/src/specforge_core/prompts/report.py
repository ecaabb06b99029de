# SPDX-License-Identifier: Apache-2.0
"""What preparing prompts counted, by source: nothing is left out in silence.

The counts are kept in the manifest of the prompt set. ``warnings_of`` says in words what of them a user should know.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import DataError

if TYPE_CHECKING:
    from specforge_core.prompts.row_encoder import RowOutcome, Sample

COUNTS: Mapping[str, str] = {
    "answers_trained": "assistant turns that are trained",
    "answers_untrained": "assistant turns that the row says not to train",
    "answers_cut": "assistant turns that their server stopped early (finish_reason length): among the untrained",
    "answers_left_out": "assistant turns not trained: they cannot be told from the rest of the text",
    "ends_trained": "trained runs that end in a stop token",
    "ends_missing": "trained runs without a stop token at their end: the draft does not learn to stop there",
    "cut": "samples cut at data.max_length",
    "thoughts_rendered": "thoughts that the template renders",
    "thoughts_lost": "thoughts that the template leaves out",
    "empty_thoughts": "empty thinking blocks that the template inserted, which are not trained",
    "tools_rendered": "rows whose tools the template renders",
    "tools_lost": "rows whose tools the template leaves out",
    "tool_calls": "tool calls that are trained",
    "texts_lost": "texts of system, user or tool that the template leaves out",
    "reencoded_alike": "rows with token ids of their own that encoding their conversation begins with",
    "reencoded_otherwise": "rows with token ids of their own that encoding their conversation does not begin with",
}
"""What may be counted of a sample, and what that means."""

PERCENTILES: Mapping[str, float] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_NUMBERS = ("rows", "samples", "tokens", "trained_tokens", "dropped")
_TABLES = ("rejected", "counts", "unused", "lengths")
_MAX_NAMES = 200
"""Of reasons, and of unused keys, in one source; what is beyond is counted together."""
_OTHERS = "others"
_REASON_CHARACTERS = 120
"""A reason is one line of a table."""
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\d+")


class SourceReport:
    """What became of the rows of one source."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self.samples = self.tokens = self.trained_tokens = self.dropped = 0
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()

    def add(self, row: RowOutcome) -> None:
        """Count a row that can be used."""
        self.dropped += row.dropped
        self.counts.update(row.counts)
        for key in sorted(row.unused):
            self.unused[_bounded(key, self.unused)] += 1

    def add_sample(self, sample: Sample) -> None:
        self.samples += 1
        self.tokens += len(sample.loss_mask)
        self.trained_tokens += sample.loss_mask.count(1)

    def reject(self, error: DataError) -> None:
        """Count a row that cannot be used."""
        self.rejected[_bounded(_reason_of(error), self.rejected)] += 1

    def as_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {
            "name": self.name,
            **numbers,
            "rejected": dict(sorted(self.rejected.items())),
            "counts": {name: self.counts[name] for name in COUNTS if self.counts[name]},
            "unused": dict(sorted(self.unused.items())),
        }

    @classmethod
    def restore(cls, saved: Mapping[str, Any]) -> SourceReport:
        """What ``as_json`` gave."""
        report = cls(saved["name"])
        for name in _NUMBERS:
            setattr(report, name, saved[name])
        for name in ("rejected", "counts", "unused"):
            getattr(report, name).update(saved[name])
        return report


def _bounded(name: str, known: Counter[str]) -> str:
    return name if name in known or len(known) < _MAX_NAMES else _OTHERS


def _reason_of(error: DataError) -> str:
    """The message without what is particular to the row."""
    return _PARTICULAR.sub("…", error.message.partition("\n")[0])[:_REASON_CHARACTERS]


def describe_lengths(lengths: Iterable[int]) -> dict[str, int]:
    """Percentiles by nearest rank, from how often each length occurs: there are many lengths, but few that differ."""
    often = Counter(lengths)
    ranked = sorted(often)
    below = list(accumulate(often[length] for length in ranked))
    if not ranked:
        return {}
    return {name: ranked[bisect_left(below, share * below[-1])] for name, share in PERCENTILES.items()}


def is_report(value: object) -> bool:
    """Whether a manifest's report of one source is as it was made."""
    if not isinstance(value, dict) or type(value.get("name")) is not str:
        return False
    numbers = [value.get(name) for name in _NUMBERS]
    for name in _TABLES:
        table = value.get(name)
        if not isinstance(table, dict):
            return False
        numbers += table.values()
    return all(type(number) is int and number >= 0 for number in numbers)


def total_of(reports: Sequence[Mapping[str, Any]], lengths: Iterable[int]) -> dict[str, Any]:
    """The reports of several sources as one."""
    total = SourceReport("all")
    for report in reports:
        for name in _NUMBERS:
            setattr(total, name, getattr(total, name) + report[name])
        for name in ("rejected", "counts", "unused"):
            getattr(total, name).update(report[name])
    return total.as_json() | {"lengths": describe_lengths(lengths)}


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What of a source's report needs a look, in words."""
    return [*_losses(report), *_left_out(report)]


def _losses(report: Mapping[str, Any]) -> Iterator[str]:
    """What the template, or the source itself, makes of rows that are used."""
    counts = Counter[str](report["counts"])
    thoughts = counts["thoughts_lost"] + counts["thoughts_rendered"]
    if counts["thoughts_lost"]:
        yield (
            f"{_share(counts['thoughts_lost'], thoughts)} of thoughts are not rendered by the template: "
            f"{counts['thoughts_lost']} of {thoughts}; templates often keep the last one only: see data.samples"
        )
    if counts["tools_lost"]:
        yield f"the template leaves out the tools of {_rows(counts['tools_lost'])}"
    if counts["texts_lost"]:
        yield f"{counts['texts_lost']} texts of system, user or tool are not rendered by the template"
    if counts["ends_missing"]:
        yield (f"{counts['ends_missing']} answers do not end in a stop token: the draft does not learn to stop there")
    if counts["answers_left_out"]:
        yield f"{counts['answers_left_out']} answers are not trained: they cannot be told from the rest of the text"
    if counts["answers_cut"]:
        yield f"{counts['answers_cut']} answers were cut short by their server, and are not trained"
    if counts["reencoded_otherwise"]:
        checked = counts["reencoded_otherwise"] + counts["reencoded_alike"]
        most = 2 * counts["reencoded_otherwise"] > checked
        yield (
            f"{_share(counts['reencoded_otherwise'], checked)} of rows with token ids of their own encode to others: "
            f"{counts['reencoded_otherwise']} of {checked}; "
            + ("is this the target that made them?" if most else "their own are used, as the target wrote them")
        )


def _left_out(report: Mapping[str, Any]) -> Iterator[str]:
    """What is not used."""
    cut = report["counts"].get("cut", 0)
    if cut:
        yield f"{_share(cut, report['samples'] + report['dropped'])} of samples are cut at data.max_length: {cut}"
    if report["dropped"]:
        yield f"{report['dropped']} samples are left out: no token of theirs is trained"
    rejected = sum(report["rejected"].values())
    if rejected:
        reasons = [f"{reason} ({count})" for reason, count in Counter(report["rejected"]).most_common(5)]
        yield f"{_rows(rejected)} cannot be used: {'; '.join(reasons)}"
    if report["unused"]:
        keys = [f"{key} ({_rows(count)})" for key, count in Counter(report["unused"]).most_common(10)]
        more = len(report["unused"]) - len(keys)
        yield f"unused keys: {', '.join(keys)}{f' and {more} more' if more else ''}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 1 or not share else f"{share:.2g} %"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
