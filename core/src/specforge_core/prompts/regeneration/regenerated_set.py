# SPDX-License-Identifier: Apache-2.0
"""A set of regenerated conversations: rows in the order of their source, and beside them what they were made with.

``answers-00000.jsonl`` and so on hold the rows, ``regeneration.json`` the settings, their fingerprint, who answered and
the digest of each file, ``regeneration-report.json`` what was made. ``data.train`` takes the directory, which appears
whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.contracts.files import describe_file, open_regular, read_json_object, sync_directory
from specforge_core.contracts.redaction import SAID_CHARACTERS, show_value
from specforge_core.prompts.reading.row_fields import REGENERATION_KEY
from specforge_core.prompts.regeneration.dialogue import ENDINGS

FORMAT = 1
MANIFEST_FILE, REPORT_FILE = "regeneration.json", "regeneration-report.json"
_FILE_BYTES = 256 << 20
"""Of one file of rows: it is encoded by one worker process, and a set of a million rows has some twenty."""
_MOST_REASONS = 20
"""The most frequent ones: a report is read on one screen."""
_FINISH_REASONS: Mapping[str, str] = {
    "stop": "answers that ended by themselves",
    "calls": "answers that end in tool calls",
    "length": "answers cut at regenerate.max_tokens",
    "failed": "answers that could not be made",
}


def fingerprint_of(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


@dataclass(slots=True)
class RegenerationReport:
    """What was made, counted from the rows that are kept."""

    conversations: int = 0
    rows: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    completion_tokens: int = 0
    with_ids: int = 0
    thoughts: int = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """One conversation's rows."""
        about = rows[-1][REGENERATION_KEY]
        self.conversations += 1
        self.rows += len(rows)
        self.with_ids += "input_ids" in rows[-1]
        self.endings[about["ending"]] += 1
        for answer in about["answers"]:
            self.answers[answer["finish_reason"]] += 1
            self.completion_tokens += answer.get("usage", {}).get("completion_tokens", 0)
            if "error" in answer:
                self.failures[answer["error"][:SAID_CHARACTERS]] += 1
        self.thoughts += sum("reasoning_content" in message for message in rows[-1]["messages"])

    def as_json(self, skipped: Mapping[str, int]) -> dict[str, Any]:
        return {
            "conversations": self.conversations,
            "rows": self.rows,
            "answers": {name: self.answers[name] for name in _FINISH_REASONS},
            "completion_tokens": self.completion_tokens,
            "conversations_with_ids": self.with_ids,
            "answers_with_thoughts": self.thoughts,
            "endings": {name: self.endings[name] for name in ENDINGS if self.endings[name]},
            "failures": dict(self.failures.most_common(_MOST_REASONS)),
            "rows_skipped": dict(skipped),
        }


def report_table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report in words."""
    rows = [("conversations", report["conversations"]), ("rows written", report["rows"])]
    rows += [(what, report["answers"][name]) for name, what in _FINISH_REASONS.items()]
    rows.append(("tokens answered", report["completion_tokens"]))
    rows.append(("conversations with the ids that were served", report["conversations_with_ids"]))
    rows.append(("answers with a thought", report["answers_with_thoughts"]))
    rows += [(f"ended: {ENDINGS.get(name, name)}", count) for name, count in report["endings"].items()]
    rows += [(f"failed: {reason}", count) for reason, count in report["failures"].items()]
    rows += [(f"row skipped: {reason}", count) for reason, count in report["rows_skipped"].items()]
    return [(what, str(count)) for what, count in rows]


def write_set(
    directory: Path,
    conversations: Iterable[Sequence[Mapping[str, Any]]],
    *,
    description: Mapping[str, Any],
    answered_by: Sequence[Mapping[str, str]],
    skipped: Mapping[str, int],
) -> None:
    """Write the set into ``directory``, which others do not see yet.

    :param conversations: the rows of each, in order.
    """
    report = RegenerationReport()
    names: list[str] = []
    directory.mkdir()
    for content in _cut(conversations, report):
        names.append(f"answers-{len(names):05d}.jsonl")
        _write(directory / names[-1], content)
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint_of(description),
        "settings": dict(description),
        "answered_by": [dict(who) for who in answered_by],
        "files": {name: describe_file(directory / name) for name in names},
    }
    counted = report.as_json(skipped)
    for name, value in ((REPORT_FILE, counted), (MANIFEST_FILE, manifest)):
        _write(directory / name, [json.dumps(value, indent=1).encode() + b"\n"])
    sync_directory(directory)


def _cut(conversations: Iterable[Sequence[Mapping[str, Any]]], report: RegenerationReport) -> Iterator[Iterator[bytes]]:
    """The lines of one file after the other; each is to be read to its end before the next."""
    lines = _lines(conversations, report)
    first = next(lines, None)

    def one_file() -> Iterator[bytes]:
        nonlocal first
        size = 0
        while first is not None and (not size or size + len(first) <= _FILE_BYTES):
            size += len(first)
            yield first
            first = next(lines, None)

    while first is not None:
        yield one_file()


def _lines(conversations: Iterable[Sequence[Mapping[str, Any]]], report: RegenerationReport) -> Iterator[bytes]:
    for rows in conversations:
        report.add(rows)
        for row in rows:
            yield json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n"


def _write(path: Path, content: Iterable[bytes]) -> None:
    with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a finished set; None where there is none.

    :raises DataError: it is not one.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    manifest = read_json_object(path, refuse=lambda reason: _damaged(path, reason))
    kinds = {"fingerprint": str, "settings": dict, "answered_by": list, "files": dict}
    if manifest.get("format") != FORMAT or any(type(manifest.get(key)) is not kind for key, kind in kinds.items()):
        raise _damaged(path, "it is of another version, or no such manifest")
    return manifest


def find_origin(path: Path) -> dict[str, str]:
    """What a file of rows was made with, to be recorded where it is prepared; nothing for files of other origin.

    :raises DataError: it lies beside a manifest that is damaged.
    """
    manifest = read_manifest(path.parent)
    if manifest is None or path.name not in manifest["files"]:
        return {}
    settings = json.dumps(manifest["settings"], sort_keys=True)
    return {"regenerated": manifest["fingerprint"], "settings": settings}


def read_report(directory: Path) -> dict[str, Any]:
    """:raises DataError: there is none, or it is damaged."""
    path = directory / REPORT_FILE
    return read_json_object(path, refuse=lambda reason: _damaged(path, reason))


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"cannot be used: {reason}", where=str(path), hint="delete the directory and regenerate")


def find_changes(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings in which two descriptions differ, in words."""
    return [
        f"{key}: {show_value(recorded.get(key))} there, {show_value(wanted.get(key))} here"
        for key in sorted(recorded.keys() | wanted.keys())
        if recorded.get(key) != wanted.get(key)
    ]
