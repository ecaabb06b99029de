# SPDX-License-Identifier: Apache-2.0
"""A report shows what the run recorded, says what is absent, and needs nothing but its own file."""

from __future__ import annotations

import json
import math
import os
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


HOSTILE = "<script>s</script>\"'><img src=x onerror=alert(1)>&\x1b[2J\u202e\x00"


def bare_run(directory: Path, **files: str | bytes) -> Path:
    """A run of a config.yaml and the named files (``bench_json="..."``)."""
    run = write_run(directory, full=False)
    for name, content in files.items():
        path = run / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return run


def test_whatever_stands_in_a_runs_files_is_text_in_its_page(tmp_path):
    shown = HOSTILE.replace("\x00", "").replace("\x1b", "").replace("\u202e", "")
    quoted = json.dumps(shown)
    facts = {HOSTILE: HOSTILE, "half": "\ud800", "formula": "$\\frac{1}$"}
    run = bare_run(
        tmp_path / f"run {shown.replace('/', ' ')}",
        config_yaml=f"strategy: {{name: {quoted}}}\ntarget: {{name: {quoted}}}\ntopology: {quoted}\n",
        bench_json=json.dumps(BENCH | {"facts": facts}),
        provenance_json=json.dumps({HOSTILE: HOSTILE}, ensure_ascii=False),
        metrics_jsonl=json.dumps({"step": 1, "loss": 2.0, HOSTILE: 1.0, "$x$": 3}) + "\n",
    )
    page = write_report(run).read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;s&lt;/script&gt;&quot;&#x27;&gt;") >= 5
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", page)


def changed(**values: object) -> str:
    return json.dumps(BENCH | values)


SIDES = BENCH["tokens_per_second"]
BENCHES = {
    "prompts": [changed(prompts=value) for value in ("<b>", True, 1.5, -1, 10**400, [1], None)],
    "new_tokens": [changed(new_tokens="7")],
    "draft_tokens": [changed(draft_tokens={"a": 1})],
    "lossless": [changed(lossless=value) for value in ("yes", 1, None)],
    "acceptance_length": [changed(acceptance_length=value) for value in ([2.0], "2", math.nan, math.inf, 1e300, True)],
    "acceptance_rate": [changed(acceptance_rate=10**400), '{"acceptance_rate": 1e400}'],
    "position_acceptance": [changed(position_acceptance=value) for value in (0.5, ["a"], [[0.5]], [0.1] * 10_000)],
    "speedup": [changed(speedup=value) for value in ([], {"decode": 1.0}, None)],
    "tokens_per_second": [changed(tokens_per_second=value) for value in ({}, SIDES | {"plain": 3}, [SIDES])],
    "facts": [changed(facts=value) for value in (["x"], "x", {"a": [1]}, {"a": {"b": 1}})],
}


@pytest.mark.parametrize("key", list(BENCHES))
def test_bench_of_wrong_kinds_is_refused_by_file_and_key(tmp_path, key):
    run = bare_run(tmp_path / "run")
    for content in BENCHES[key]:
        (run / "bench.json").write_text(content)
        with pytest.raises(DataError) as raised:
            write_report(run)
        where, _, named = raised.value.where.rpartition(": ")
        assert where.endswith("bench.json")
        assert key in named or "1e400" in content
        assert len(str(raised.value)) < 500 + len(str(run))
    assert not (run / "report").exists()


def test_damaged_json_is_refused_by_file(tmp_path):
    run = bare_run(tmp_path / "run")
    for name in ("bench.json", "provenance.json"):
        for content in (
            b"",
            b"[]",
            b"null",
            b"\xff",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b'{"a": ' + b"9" * 5000 + b"}",
        ):
            (run / name).write_bytes(content)
            with pytest.raises(DataError, match="damaged") as raised:
                write_report(run)
            assert raised.value.where.endswith(name)
        (run / name).unlink()


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": true}', '{"step": 1e400}', '{"step": "1"}', '{"step": -1}', '{"step": 1.5}', '{"step": NaN}'),
        *('{"step": 99999999999999999999}', '{"step": null}', "[1]", "1", "{}", "[" * 100_000),
        *('{"step": 1, "loss": true}', '{"step": 1, "loss": "low"}', '{"step": 1, "loss": [1]}'),
        '{"step": 1, "loss": 1' + "0" * 400 + "}",
        '{"step": 1, "loss": 1e300}',
        '{"step": 1, "' + "<b>" * 1000 + '": {}}',
        '{"step": 1, "' + "a" * 10_000_000 + '": 1}',
    ],
    ids=lambda line: line[:40],
)
def test_lines_that_record_no_step_are_refused_by_number(tmp_path, line):
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        run = bare_run(tmp_path / name)
        (run / name).write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
        with pytest.raises(DataError) as raised:
            write_report(run)
        assert raised.value.where.endswith(f"{name}:2")
        assert len(str(raised.value)) < 500 + len(str(run))


def test_a_log_without_line_ends_is_not_read_into_memory(tmp_path):
    run = bare_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="longer than"):
        write_report(run)


def test_numbers_at_the_ends_of_what_is_taken_can_be_drawn(tmp_path):
    names = ("loss", "learning_rate", "simulated_acceptance_length", "accuracy_0", "tokens_per_second", "seconds")
    values = [1e30, -1e30, 5e-324, math.nan, math.inf, -math.inf, 0, 10**29]
    rows = [{"step": step, "waited_seconds": -value} | dict.fromkeys(names, value) for step, value in enumerate(values)]
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 2**53, "loss": 1.0}])
    bench = changed(position_acceptance=[1e30, -1e30, None] * 40, acceptance_length=-1e30, prompts=2**53)
    run = bare_run(tmp_path / "run", metrics_jsonl=lines, evaluations_jsonl=lines, bench_json=bench)
    assert write_report(run).read_text().count("data:image/png") == 7


def test_a_run_whose_losses_are_none_has_no_last_loss(tmp_path):
    run = bare_run(tmp_path / "run", metrics_jsonl='{"step": 1, "loss": NaN}\n')
    assert "last training loss" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "a: &x\n  b: *x\n",
        "[" * 200_000,
        "- " * 100_000,
        "{" * 100_000,
        "a: [b",
        "- a",
        "",
        "a: \0",
        'a: "\\UFFFFFFFF"',
        'a: "\\U00110000"',
        "%YAML " + "9" * 5000 + ".1\n---\na: 1\n",
        "? [a]\n: b\n",
        "a: 1\n---\nb: 2\n",
        "a: " + "b" * 1_000_000,
    ],
    ids=range(15),
)
def test_a_configuration_that_none_of_ours_is_is_refused(tmp_path, text):
    run = bare_run(tmp_path / "run", config_yaml=text)
    with pytest.raises(DataError) as raised:
        write_report(run)
    assert raised.value.where.endswith("config.yaml")
    assert raised.value.hint


def test_a_configuration_is_shown_as_it_stands_and_nothing_in_it_is_made(tmp_path):
    text = "strategy: {name: !!python/name:os.system x}\ntarget: [1]\ntopology: !!timestamp never\na: !!int ''\n"
    page = write_report(bare_run(tmp_path / "run", config_yaml=text)).read_text()
    assert "!!python/name:os.system x" in page
    assert "target engine unknown" in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "evaluations.jsonl", "bench.json", "provenance.json"])
def test_a_link_in_a_runs_directory_is_not_followed(tmp_path, name):
    run = write_run(tmp_path / "run", full=True)
    (run / name).replace(tmp_path / "secret")
    (run / name).symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="symbolic link"):
        write_report(run)
    assert not (run / "report").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "bench.json", "provenance.json"])
def test_what_is_there_and_no_file_is_not_passed_over(tmp_path, name):
    run = write_run(tmp_path / "run", full=True)
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(DataError, match="not a regular file"):
        write_report(run)


def test_a_report_is_not_written_through_links(tmp_path):
    run = write_run(tmp_path / "run", full=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "report").symlink_to(elsewhere)
    with pytest.raises(DataError, match="symbolic link"):
        write_report(run)
    assert list(elsewhere.iterdir()) == []
    (run / "report").unlink()
    (run / "report").mkdir()
    (elsewhere / "mine").write_text("mine")
    for name in ("index.html", "loss.png", f".index.html.{os.getpid()}"):
        (run / "report" / name).symlink_to(elsewhere / "mine")
    assert not write_report(run).is_symlink()
    assert (elsewhere / "mine").read_text() == "mine"
