# SPDX-License-Identifier: Apache-2.0
"""A report shows what the run recorded, says what is absent, and needs nothing but its own file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from specforge_core.contracts import DataError
from specforge_core.reporting.records import read_lines
from specforge_core.reporting.report import write_report

BENCH = {
    "lossless": True,
    "acceptance_length": 2.31,
    "acceptance_rate": 0.41,
    "position_acceptance": [0.71, 0.55, 0.4, 0.31, None],
    "prompts": 20,
    "new_tokens": 1280,
    "draft_tokens": 5,
    "tokens_per_second": {
        "plain": {"decode": 210.0, "with_prefill": 205.0},
        "speculative": {"decode": 260.0, "with_prefill": 250.0},
    },
    "speedup": {"decode": 1.238, "with_prefill": 1.22},
    "facts": {"target": "tiny <model>", "threads": 2},
}


def write_run(directory: Path, *, full: bool) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text("run: {directory: x}\nstrategy: {name: toy}\ntarget: {name: hf}\n")
    if not full:
        return directory
    steps, evaluations = [], []
    for step in range(1, 121):
        learned = 1 - math.exp(-step / 40)
        row = {"step": step, "loss": 6 - 3 * learned + 0.2 * math.sin(step), "learning_rate": 1e-4 * (1 - step / 121)}
        row |= {"tokens_per_second": 2000 + 100 * math.cos(step), "seconds": 0.5, "waited_seconds": 0.1}
        row |= {
            "simulated_acceptance_length": 1 + learned,
            **{f"accuracy_{k}": 0.6 * learned / (k + 1) for k in (0, 1)},
        }
        steps.append(row)
        if step % 30 == 0:
            evaluations.append({name: row[name] for name in row if name.startswith(("step", "loss", "sim", "acc"))})
    for name, rows in (("metrics", steps), ("evaluations", evaluations)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "bench.json").write_text(json.dumps(BENCH))
    (directory / "provenance.json").write_text(json.dumps({"machine": {"torch": "x.y"}}))
    return directory


def test_full_run_gives_one_page_that_asks_nothing_of_the_network(tmp_path):
    page = write_report(write_run(tmp_path / "my-run", full=True))
    text = page.read_text()
    assert page.name == "index.html"
    assert text.count("data:image/png;base64,") == 7
    assert not re.search(r"https?://|<script|<link|url\(", text)
    assert "my-run" in text
    assert "2.31" in text
    assert "tiny &lt;model&gt;" in text
    assert "Not recorded" not in text
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in page.parent.glob("*.png"))
    assert len(list(page.parent.iterdir())) == 8


def test_absent_pieces_are_left_out_with_a_sentence(tmp_path):
    text = write_report(write_run(tmp_path / "run", full=False)).read_text()
    assert "Not recorded by this run: Simulated acceptance length, Loss" in text
    assert "This run was not benched" in text
    assert "data:image" not in text


def test_lossy_bench_is_shouted(tmp_path):
    run = write_run(tmp_path / "run", full=True)
    (run / "bench.json").write_text(json.dumps({**BENCH, "lossless": False}))
    assert "DIFFERED" in write_report(run).read_text()


def test_torn_last_line_is_ignored_and_a_damaged_one_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match="damaged") as raised:
        read_lines(path)
    assert raised.value.where.endswith("metrics.jsonl:2")


def test_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_bench_names_the_file(tmp_path):
    run = write_run(tmp_path / "run", full=False)
    (run / "bench.json").write_text("{")
    with pytest.raises(DataError, match="not JSON") as raised:
        write_report(run)
    assert raised.value.where.endswith("bench.json")
