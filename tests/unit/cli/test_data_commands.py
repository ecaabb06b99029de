# SPDX-License-Identifier: Apache-2.0
"""``data check``, ``data show`` and what ``plan`` says of data: as a user sees it, with every text only text."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Specforge, make_run_file
from rich.console import Console
from specforge_core.cli.data_report import render_report
from specforge_core.cli.main import main
from specforge_core.cli.prompt_view import Piece, bracket, print_prompt, render_prompt_page
from specforge_core.prompts.report import SourceReport, total_of, warnings_of
from tiny_model import TinyModel

Command = Callable[..., "Ended"]
TALK = [{"role": "user", "content": "the <b>draft</b>"}, {"role": "assistant", "content": "several [red]tokens[/red]"}]
THOUGHT = [TALK[0], {**TALK[1], "reasoning_content": "in one pass"}]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `specforge` in ``tmp_path``, in this process: importing torch for each would take most of the time."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(arguments)
        said = capsys.readouterr()
        return Ended(int(left.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def run_file(tiny_model: TinyModel, tmp_path: Path) -> Path:
    rows = [{"messages": TALK, "mood": "odd"}, {"messages": THOUGHT}, {"messages": "none"}]
    train = tmp_path / "talks.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(train)], "eval": [], "on_bad_row": "skip"}
    return make_run_file(tiny_model, tmp_path / "run.yaml", data=data)


def test_check_says_what_became_of_each_row(run_file: Path, specforge: Specforge) -> None:
    ended = specforge("data", "check", "run.yaml")
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"talks\.jsonl +3 +2 +\d+ +\d+ \(\d+ %\) +0 +0 +1 ", ended.stdout)
    assert "warning: 100 % of thoughts are not rendered by the template: 1 of 1" in ended.stdout
    assert "warning: 1 row cannot be used: is not a list of turns, or empty (1)" in ended.stdout
    assert "warning: unused keys: mood (1 row)" in ended.stdout
    assert "answers trained  2" in ended.stdout
    again = specforge("data", "check", "run.yaml", "--json")
    found = json.loads(again.stdout)["train"]
    assert found["total"]["rows"] == 3
    assert found["sources"][0]["unused"] == {"mood": 1}
    assert (run_file.parent / "run" / "features" / "train" / "prompts" / "rejects.jsonl").exists()


def test_a_sample_is_kept_nowhere(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    make_run_file(tiny_model, tmp_path / "run.yaml")
    ended = command("data", "check", "run.yaml", "--sample", "5", "--json")
    found = json.loads(ended.stdout)
    assert (found["train"]["total"]["samples"], found["eval"]["total"]["samples"]) == (5, 5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".run", "run"))] == ["run.yaml"]


def test_show_brackets_what_is_trained_and_writes_a_page(run_file: Path, command: Command) -> None:
    ended = command("data", "show", "run.yaml", "talks-00001", "--html", "page.html")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("talks-00001: ")
    assert "user\nthe <b>draft</b><|im_end|>" in ended.stdout
    assert "<|im_start|>assistant\n⟦several [red]tokens[/red]<|im_end|>⟧" in ended.stdout
    page = (run_file.parent / "page.html").read_text()
    assert "the &lt;b&gt;draft&lt;/b&gt;" in page
    assert "<mark>several [red]tokens[/red]&lt;|im_end|&gt;</mark>" in page
    assert "http" not in page
    first = command("data", "show", "run.yaml", "1", "data.max_length=40")
    assert first.stdout.startswith("talks-00000: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "run.yaml", "nobody"], "there is no prompt 'nobody'"),
        (["show", "run.yaml", "9"], "a number from 1 to 2, or an id such as talks-00000"),
        (["show", "run.yaml", "1", "2"], "2 prompts are named"),
        (["show", "run.yaml", "--split", "test"], "'test' is not train or eval"),
        (["show", "run.yaml", "--split", "eval"], "data.eval: the run has no held-out prompts"),
        (["show", "run.yaml", "--html", "nowhere/page.html"], "nowhere/page.html: cannot be written"),
        (["check", "run.yaml", "data.on_bad_row=stop"], "talks.jsonl:3: messages: is not a list of turns"),
        (["check", "run.yaml", "data.on_bad_row=ignore"], "on_bad_row"),
        (["check", "none.yaml"], "there is no such run file"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_done_is_said(run_file: Path, command: Command, arguments: list[str], message: str) -> None:
    ended = command("data", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_empty_source_is_an_error(tiny_model: TinyModel, tmp_path: Path, command: Command) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    make_run_file(tiny_model, tmp_path / "run.yaml", data={"train": ["empty.jsonl"], "eval": []})
    ended = command("data", "check", "run.yaml")
    assert (ended.returncode, "empty.jsonl: holds no prompts" in ended.stderr) == (2, True)
    assert "empty.jsonl: JSON lines; 0 B; problem: empty.jsonl: holds no prompts" in command("plan", "run.yaml").stdout


def test_plan_says_what_of_the_data_a_run_will_meet(run_file: Path, command: Command) -> None:
    ended = command("plan", "run.yaml")
    assert ended.returncode == 0, ended.stderr
    assert "prompts    train: not prepared yet" in ended.stdout
    assert re.search(r"talks\.jsonl: JSON lines; \d+ B; problem: .*talks\.jsonl:3: messages: is", ended.stdout)
    command("data", "check", "run.yaml")
    assert "prompts    train: 2 prompts are prepared" in command("plan", "run.yaml").stdout
    found = json.loads(command("plan", "run.yaml", "--json", "data.max_length=50").stdout)["data"]["train"]
    assert found["prepared"] is None
    assert found["sources"][0]["format"] == "JSON lines"


PIECES = [Piece("<|user|>\x1b[31m[bold]hi[/bold]⟧ ", trained=False), Piece("an <i>answer</i>\n", trained=True)]


def test_colour_where_there_is_any_and_brackets_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    print_prompt("title", PIECES, Console(force_terminal=True, color_system="standard", no_color=False, width=200))
    shown = capsys.readouterr().out
    assert "\x1b[1;32man <i>answer</i>" in shown
    assert r"<|user|>\x1b[31m[bold]hi[/bold]⟧ " in shown
    print_prompt("title", PIECES, Console(force_terminal=True, color_system="standard", no_color=True, width=200))
    assert capsys.readouterr().out == f"title\n{bracket(PIECES)}\n"
    assert bracket(PIECES) == "<|user|>\\x1b[31m[bold]hi[/bold]\\u27e7 ⟦an <i>answer</i>\n⟧"


def test_a_page_holds_text_only() -> None:
    page = render_prompt_page("<script>", PIECES)
    body = re.sub(r"<style>.*?</style>", "", page)
    tags = {tag.strip("/") for tag in re.findall(r"<(/?\w+)", body)}
    assert tags <= {"html", "head", "meta", "title", "body", "h1", "p", "pre", "mark"}
    assert html.unescape(page).count("<script>") == 2


def report(**counts: int) -> dict[str, object]:
    made = SourceReport("a.jsonl")
    made.rows, made.samples, made.tokens, made.trained_tokens = 100, 90, 1000, 400
    made.counts.update(counts)
    return {**made.as_json(), "lengths": {"p50": 1, "p90": 2, "p99": 3, "max": 4}}


@pytest.mark.parametrize(
    ("counts", "warning"),
    [
        (
            {"thoughts_lost": 12, "thoughts_rendered": 88},
            "12 % of thoughts are not rendered by the template: 12 of",
        ),
        ({"ends_missing": 37}, "37 answers do not end in a stop token"),
        ({"tools_lost": 2}, "the template leaves out the tools of 2 rows"),
        ({"texts_lost": 3}, "3 texts of system, user or tool are not rendered"),
        ({"answers_left_out": 4}, "4 answers are not trained"),
        ({"answers_cut": 5}, "5 answers were cut short"),
        (
            {"reencoded_alike": 199, "reencoded_otherwise": 1},
            "0.5 % of rows with token ids of their own encode to others: 1 of 200; their own are used",
        ),
        (
            {"reencoded_alike": 1, "reencoded_otherwise": 3},
            "75 % of rows with token ids of their own encode to others: 3 of 4; is this the target",
        ),
        ({"cut": 9}, "10 % of samples are cut at data.max_length: 9"),
    ],
    ids=str,
)
def test_what_needs_a_look_is_said_in_words(counts: dict[str, int], warning: str) -> None:
    [said] = warnings_of(report(**counts))
    assert said.startswith(warning)
    assert warnings_of(report(answers_trained=5, ends_trained=5)) == []


def test_many_sources_are_one_line_each_and_a_total() -> None:
    sources = [{**report(ends_missing=1), "name": f"part-{number}.jsonl"} for number in range(40)]
    described = {
        "directory": "set",
        "sources": sources,
        "total": total_of(sources, [1, 2, 3, 4]),
        "warnings": {source["name"]: warnings_of(source) for source in sources},
    }
    shown = render_report("train", described)
    assert "part-29.jsonl" in shown
    assert "part-30.jsonl" not in shown
    assert "and 10 more sources" in shown
    assert re.search(r"^all +4000 +3600 ", shown, re.MULTILINE)
    assert shown.count("warning:") == 1
