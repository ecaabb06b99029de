# SPDX-License-Identifier: Apache-2.0
"""``specforge regenerate`` as a user has it: what comes out is a source, says how it was made, and is not mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_service import ChatService, Json, chat_service, complete
from command_line import make_run_file
from regenerating import read_answers, write_talks
from specforge_core.cli.main import main
from tiny_model import TinyModel

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
TALKS: list[Json] = [
    {"id": "two", "messages": [{"role": r, "content": f"{r} {n}"} for n, r in enumerate(("user", "assistant") * 2)]},
    {"id": "asked", "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]},
    {
        "id": "tools",
        "tools": TOOLS,
        "messages": [
            {"role": "user", "content": "add one"},
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "old"}]},
            {"role": "tool", "tool_call_id": "old", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
    },
    {"id": "cut", "messages": [{"role": "user", "content": "CUT"}, {"role": "assistant", "content": "x"}]},
    {"id": "refused", "messages": [{"role": "user", "content": "REFUSE"}, {"role": "assistant", "content": "x"}]},
    {"id": "told", "prompt": "what", "completion": "that"},
]


def behave(service: ChatService, body: Json) -> tuple[int, Json]:
    said = str(body["messages"][-1]["content"])
    if said == "REFUSE":
        return 400, {"message": "not this"}
    if said == "CUT":
        return 200, complete(body, content="on and on", finish_reason="length")
    if said == "add one":
        return 200, complete(body, content="", finish_reason="tool_calls", tool_calls=[CALL], reasoning_content="hm")
    return 200, complete(body)


def run(*arguments: str) -> int:
    """The command's exit status."""
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return int(left.value.code or 0)


def make_run(tmp_path: Path, tiny_model: TinyModel, rows: list[Json], **changes: Any) -> str:
    source = tmp_path / "talks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(source)], "eval": [], "max_length": 256, **changes.pop("data", {})}
    return str(make_run_file(tiny_model, tmp_path / "run.yaml", data=data, **changes))


def test_what_servers_answer_is_a_source_of_prompts(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_service() as service:
        service.behave = behave
        run_file = make_run(tmp_path, tiny_model, TALKS, regenerate={"servers": [service.address]})
        assert run("regenerate", run_file) == 0
        assert run("regenerate", run_file) == 0, "it is there"
        asked = len(service.asked)
    assert asked == 2 + 1 + 2 + 1 + 2 + 1, "the refused one is asked without ids, then given up"
    shown = capsys.readouterr().out
    made = tmp_path / "run" / "regenerated" / "train"
    report = json.loads((made / "regeneration-report.json").read_text())
    assert report["answers"] == {"stop": 5, "calls": 1, "length": 1, "failed": 1}
    assert report["endings"] == {"done": 4, "cut": 1, "failed": 1}
    assert report["failures"] == {"refused: status 400 not this": 1}
    assert "answers cut at regenerate.max_tokens" in shown
    assert "failed: refused: status 400 not this" in shown
    rows = {row["id"]: row for row in read_answers(made)}
    assert [*rows] == [row["id"] for row in TALKS]
    tools = rows["tools"]["messages"]
    assert (tools[1]["reasoning_content"], tools[1]["tool_calls"]) == ("hm", [CALL])
    assert (tools[2]["tool_call_id"], tools[2]["content"]) == ("c1", "2")
    manifest = json.loads((made / "regeneration.json").read_text())
    assert manifest["answered_by"] == [{"model": "tiny", "server": "7.8.9"}]
    # the target's template renders no calls, so the conversation that ends in one is left out, and said
    assert run("data", "check", run_file, f"data.train=[{made}]", "data.on_bad_row=skip") in (0, 1)
    assert "6" in capsys.readouterr().out


def test_the_settings_of_a_regeneration_are_in_the_records_of_a_run(tmp_path: Path, tiny_model: TinyModel) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "run.yaml", regenerate={"max_tokens": 12, "temperature": 0.5})
    assert run("regenerate", str(run_file), "--limit", "12") == 0
    made = tmp_path / "run" / "regenerated" / "train"
    rows = read_answers(made)
    assert len(rows) == 12
    assert all(any(row["loss_mask"]) for row in rows)
    assert run("run", str(run_file), f"data.train=[{made}]", "training.global_batch_size=4") == 0
    assert run("export", str(tmp_path / "run")) == 0
    fingerprint = json.loads((made / "regeneration.json").read_text())["fingerprint"]
    exported = next((tmp_path / "run" / "export").iterdir())
    for place in (tmp_path / "run" / "provenance.json", exported / "specforge.json"):
        [origin] = json.loads(place.read_text())["origins"]
        assert origin["regenerated"] == fingerprint
        assert json.loads(origin["settings"])["temperature"] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["regenerate.max_tokens=13"], "other settings: max_tokens: 12 there, 13 here"),
        (["--limit", "3"], "other settings: most: 2 there, 3 here"),
        (["run.seed=9"], "seed"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    write_talks(tmp_path / "talks.jsonl", 3)
    data = {"train": [str(tmp_path / "talks.jsonl")], "eval": []}
    run_file = make_run_file(tiny_model, tmp_path / "run.yaml", data=data, regenerate={"max_tokens": 12})
    assert run("regenerate", str(run_file), "--limit", "2") == 0
    capsys.readouterr()
    assert run("regenerate", str(run_file), "--limit", "2", *changes) == 2
    assert said in capsys.readouterr().err


BAD: dict[str, tuple[list[str], str]] = {
    "no server": (["regenerate.servers=[http://127.0.0.1:9/v1]"], "no server answers"),
    "no address": (["regenerate.servers=[localhost:8000]"], "is no address of a server"),
    "no key": (
        ["regenerate.servers=[http://127.0.0.1:9/v1]", "regenerate.api_key_file=none"],
        "the key cannot be read",
    ),
    "no switch": (["regenerate.thinking=off"], "no variable that turns thinking on or off"),
    "no eval": (["--split", "eval"], "no prompts are given"),
    "no split": (["--split", "test"], "test"),
    "no source": (["data.train=[none.jsonl]"], "none.jsonl"),
    "an unknown key": (["regenerate.server=x"], "servers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_and_nothing_is_made(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    arguments, said = BAD[name]
    run_file = make_run(tmp_path, tiny_model, TALKS)
    assert run("regenerate", run_file, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "regenerated" / "train").exists()


def test_rows_that_cannot_be_answered_stop_it_or_are_counted(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*TALKS[:2], {"input_ids": [1, 2], "loss_mask": [0, 1]}, {"messages": []}]
    run_file = make_run(tmp_path, tiny_model, rows, regenerate={"max_tokens": 4})
    assert run("regenerate", run_file) == 2
    assert "talks.jsonl:3: holds tokens or rendered text" in capsys.readouterr().err
    assert run("regenerate", run_file, "data.on_bad_row=skip") == 0
    report = json.loads((tmp_path / "run/regenerated/train/regeneration-report.json").read_text())
    assert (report["conversations"], sum(report["rows_skipped"].values())) == (2, 2)
