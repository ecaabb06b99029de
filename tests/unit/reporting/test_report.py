# SPDX-License-Identifier: Apache-2.0
"""A report shows what the run recorded, says what is absent, and needs nothing but its own file."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
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


MARKUP = """<script>alert(1)</script><img src=x onerror='alert(2)'>"><b>&lt;\"'</title></style>"""
HIDDEN = "\x00\x1b[2J\x07\u202e\u2066\ud800\x85"


class Elements(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_whatever_stands_in_a_runs_files_is_text(tmp_path):
    honest = write_run(tmp_path / "run", full=True)
    plain = Elements(write_report(honest).read_text())
    run = write_run(tmp_path / ("<b>" + "".join(c for c in MARKUP if c != "/")), full=True)
    names = {"strategy": {"name": MARKUP}, "target": {"name": MARKUP}, "topology": MARKUP}
    (run / "config.yaml").write_text(json.dumps({**names, MARKUP: [MARKUP, HIDDEN]}))
    (run / "provenance.json").write_text(json.dumps({MARKUP: MARKUP, "hidden": HIDDEN}, ensure_ascii=True))
    facts = {MARKUP: MARKUP, "hidden": HIDDEN, "mathematics": "$\\frac{$"}
    (run / "bench.json").write_text(json.dumps({**BENCH, "facts": facts}))
    rows = [{"step": step, "loss": 1.0, MARKUP: 2.0, "$x_$": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run).read_text()
    found = Elements(text)
    assert set(found.tags) == set(plain.tags)
    assert found.attributes == plain.attributes
    assert "alert(1)" in text
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "\\u202e" in text


WRONG = [None, "x", "<b>", [], [1], {}, {"a": 1}, True, -1, float("nan"), float("inf"), 1e308, 10**400, [["x"]]]


@pytest.mark.parametrize("key", list(BENCH))
def test_a_bench_field_of_another_kind_is_named(tmp_path, key):
    run, refusals = write_run(tmp_path / "run", full=False), 0
    for value in WRONG:
        (run / "bench.json").write_text(json.dumps({**BENCH, key: value}))
        try:
            write_report(run)
        except DataError as error:
            where = error.where
            assert where == f"{run / 'bench.json'}: {key}"
            refusals += 1
    assert refusals >= 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("speedup", {"decode": "fast", "with_prefill": 1.0}),
        ("speedup", {"decode": 1.0}),
        ("tokens_per_second", {"plain": {"decode": 1.0, "with_prefill": [1]}, "speculative": {}}),
        ("position_acceptance", [0.5, "x"]),
        ("position_acceptance", [2.0]),
        ("position_acceptance", [0.5] * 5000),
        ("facts", {"a": ["<b>"]}),
        ("facts", {"a": "x" * 100_000}),
        ("facts", {str(number): 1 for number in range(1000)}),
    ],
)
def test_a_bench_field_whose_parts_are_of_another_kind_is_named(tmp_path, key, value):
    run = write_run(tmp_path / "run", full=False)
    (run / "bench.json").write_text(json.dumps({**BENCH, key: value}))
    with pytest.raises(DataError) as refused:
        write_report(run)
    assert refused.value.where == f"{run / 'bench.json'}: {key}"
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"7", b"\xff\xfe", b""], ids=repr)
@pytest.mark.parametrize("name", ["bench.json", "provenance.json"])
def test_a_json_file_that_is_no_object_is_named(tmp_path, name, content):
    run = write_run(tmp_path / "run", full=False)
    (run / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        write_report(run)
    assert refused.value.where == str(run / name)


@pytest.mark.parametrize(
    "row",
    [
        '{"step": "1"}',
        '{"step": true}',
        '{"step": 1.5}',
        '{"step": -1}',
        '{"step": null}',
        '{"step": [1]}',
        '{"step": 1e400}',
        '{"step": NaN}',
        '{"step": 99999999999999999999}',
        '{"step": 1, "loss": "<b>"}',
        '{"step": 1, "loss": [1]}',
        '{"step": 1, "loss": {}}',
        '{"step": 1, "loss": true}',
        "[]",
        "7",
        "null",
        "[" * 100_000,
    ],
    ids=lambda row: row[:24],
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_log_line_of_another_kind_is_named(tmp_path, name, row):
    run = write_run(tmp_path / "run", full=False)
    (run / name).write_text('{"step": 1}\n' + row + '\n{"step": 3}\n')
    with pytest.raises(DataError) as refused:
        write_report(run)
    assert refused.value.where == f"{run / name}:2"


def test_a_line_without_end_and_a_log_without_end_are_refused(tmp_path):
    run = write_run(tmp_path / "run", full=False)
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "a": "' + b"x" * (10 << 20))
    with pytest.raises(DataError, match="longest line"):
        write_report(run)
    with (run / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="longest line"):
        write_report(run)
    (run / "metrics.jsonl").write_bytes(b"\n" * 1_000_002)
    with pytest.raises(DataError, match="longest log"):
        write_report(run)


def test_numbers_that_cannot_be_drawn_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", full=True)
    odd = ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1" + "0" * 400, "null"]
    names = ["loss", "learning_rate", "tokens_per_second", "seconds", "waited_seconds", "accuracy_0"]
    lines = [
        "{" + ", ".join([f'"step": {step}', *(f'"{name}": {value}' for name in names)]) + "}"
        for step, value in enumerate([*odd, "1.5", "-1e30"], start=1)
    ]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).write_text("\n".join(lines) + "\n")
    assert "optimizer steps" in write_report(run).read_text()


def test_more_draft_positions_than_can_be_read_are_not_drawn(tmp_path):
    run = write_run(tmp_path / "run", full=False)
    row = {"step": 1, **{f"accuracy_{position}": 0.5 for position in range(20_000)}}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_report(run)


BOMB = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "strategy: {name: *i}\n",
        "strategy: &s {name: *s}\n",
        "a: " + "[" * 20_000,
        "a: " * 20_000,
        "a: 1\n" * 100_000,
        "- 1\n",
        "7",
        "",
        "? [a]\n: b\n",
        "a: \x00",
        "<<: *a",
    ],
    ids=lambda text: repr(text[:16]),
)
def test_a_resolved_run_file_that_is_none_is_named(tmp_path, text):
    run = write_run(tmp_path / "run", full=False)
    (run / "config.yaml").write_text(text)
    with pytest.raises(DataError) as refused:
        write_report(run)
    assert refused.value.where == str(run / "config.yaml")


@pytest.mark.parametrize(
    "text", ["a: !!timestamp x", "a: !!int ''", "a: !!python/object/apply:os.system [x]", "a: 1e400"]
)
def test_tags_of_a_resolved_run_file_construct_nothing(tmp_path, text):
    run = write_run(tmp_path / "run", full=False)
    (run / "config.yaml").write_text(text + "\nstrategy: {name: [1]}\ntarget: 7\ntopology: {}\n")
    assert "strategy unknown · target engine unknown · topology unknown" in write_report(run).read_text()


NAMES = ["config.yaml", "metrics.jsonl", "evaluations.jsonl", "bench.json", "provenance.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_a_received_run_is_not_shown(tmp_path, name):
    run, elsewhere = write_run(tmp_path / "run", full=True), tmp_path / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(DataError) as refused:
        write_report(run)
    assert refused.value.where == str(run / name)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(DataError, match="cannot be read"):
        write_report(run)


def test_a_report_is_not_written_through_links(tmp_path):
    run, outside = write_run(tmp_path / "run", full=True), tmp_path / "outside"
    outside.mkdir()
    (run / "report").symlink_to(outside)
    with pytest.raises(DataError, match="cannot be written"):
        write_report(run)
    (run / "report").unlink()
    (run / "report").mkdir()
    (outside / "mine").write_text("mine")
    for name in ("index.html", "loss.png"):
        (run / "report" / name).symlink_to(outside / "mine")
    os.link(outside / "mine", run / "report" / "bench.png")
    write_report(run)
    assert [path.read_text() for path in outside.iterdir()] == ["mine"]
    assert not (run / "report" / "index.html").is_symlink()
