# SPDX-License-Identifier: Apache-2.0
"""Prompts that are missing, malformed, or not for this target."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import zstandard
from bad_input import BadInput, Workshop
from pyarrow import parquet

GOOD = {"input_ids": [1, 2, 3, 4], "loss_mask": [0, 0, 1, 1]}
ASK, ANSWER = {"role": "user", "content": "the draft"}, {"role": "assistant", "content": "checks them"}


def _rows(*rows: object):
    return lambda w: ["capture", w.prompts(*rows)]


def _tokens(**keys: object):
    """The second row is a pre-tokenised one with these keys."""
    return _rows(GOOD, {**GOOD, **keys})


def _turns(*turns: object):
    return _rows({"messages": [ASK, ANSWER]}, {"messages": list(turns)})


def _bytes(content: bytes):
    return lambda w: ["capture", w.raw_prompts(content)]


def _file(name: str, content: bytes):
    def spoil(w: Workshop) -> list[str]:
        return ["capture", w.write(name, content) and w.run_file(data={"train": [name], "eval": None})]

    return spoil


def _table(**columns: list[object]):
    def spoil(w: Workshop) -> list[str]:
        parquet.write_table(pa.table(columns), w.root / "prompts.parquet")
        return ["capture", w.run_file(data={"train": ["prompts.parquet"], "eval": None})]

    return spoil


def _mapped(*rows: object, **mapping: str):
    def spoil(w: Workshop) -> list[str]:
        w.write("prompts.jsonl", rows)
        return ["capture", w.run_file(data={"train": ["prompts.jsonl"], "eval": None, "mapping": mapping})]

    return spoil


def _hub(**source: str):
    return lambda w: ["plan", w.run_file(data={"train": [source], "eval": None})]


def _no_dataset(w: Workshop) -> list[str]:
    w.write("folder/notes.txt", "x")
    return ["capture", w.run_file(data={"train": ["folder"]})]


def _empty_directory(w: Workshop) -> list[str]:
    (w.root / "folder").mkdir()
    return ["capture", w.run_file(data={"train": ["folder"]})]


_LINE = json.dumps(GOOD).encode() + b"\n"

TABLE = [
    BadInput("prompts empty", _bytes(b""), ("prompts.jsonl", "holds no prompts", "one JSON object per line")),
    BadInput(
        "prompts of blank lines", _bytes(b"\n \n"), ("prompts.jsonl", "holds no prompts", "one JSON object per line")
    ),
    BadInput(
        "line that is no JSON", _bytes(_LINE + b'{"input_ids": [1,\n'), ("prompts.jsonl:2", "is not JSON", "per line")
    ),
    BadInput("line that is no object", _rows(GOOD, [1, 2]), ("prompts.jsonl:2", "is a JSON list", "one JSON object")),
    BadInput(
        "line that is not UTF-8", _bytes(_LINE + b'{"id": "\xff"}\n'), ("prompts.jsonl:2", "not UTF-8", "convert")
    ),
    BadInput(
        "row of unknown keys", _rows(GOOD, {"text": "hello"}), ("prompts.jsonl:2", "messages", "text", "a row is")
    ),
    BadInput(
        "loss mask of another length",
        _tokens(loss_mask=[1, 1]),
        ("prompts.jsonl:2: loss_mask", "2 entries", "one length"),
    ),
    BadInput("loss mask missing", _tokens(loss_mask=None), ("prompts.jsonl:2: loss_mask", "missing", "0 and 1")),
    BadInput("loss mask of weights", _tokens(loss_mask=[0, 0, 0.5, 1]), ("prompts.jsonl:2: loss_mask", "0 and 1")),
    BadInput(
        "token ids of text", _tokens(input_ids=["a"] * 4), ("prompts.jsonl:2: input_ids", "not a list of token ids")
    ),
    BadInput(
        "token id negative", _tokens(input_ids=[1, -2, 3, 4]), ("prompts.jsonl:2: input_ids", "not a list of token ids")
    ),
    BadInput(
        "token id beyond the vocabulary",
        _tokens(input_ids=[1, 2, 3, 99999]),
        ("prompts.jsonl:2", "vocabulary mismatch", "99999", "sample prompts-00001", "target's own tokenizer"),
    ),
    BadInput(
        "token id beyond 32 bits", _tokens(input_ids=[1, 2, 3, 1 << 40]), ("prompts.jsonl:2", "vocabulary mismatch")
    ),
    BadInput(
        "role unknown",
        _turns(ASK, {**ANSWER, "role": "teacher"}),
        ("prompts.jsonl:2: messages[1].role", "'teacher'", "roles are"),
    ),
    BadInput(
        "turn without content",
        _turns(ASK, {"role": "assistant"}),
        ("prompts.jsonl:2: messages[1].content", "a turn is"),
    ),
    BadInput("turn that is text", _turns("hello"), ("prompts.jsonl:2: messages[0]", "is a str", "a turn is")),
    BadInput("conversation empty", _turns(), ("prompts.jsonl:2: messages", "empty", "at least one")),
    BadInput(
        "nothing to train", _rows({"messages": [ASK]}), ("run/features/train/prompts", "1 dropped", "assistant turns")
    ),
    BadInput(
        "everything cut off before the answer",
        lambda w: ["capture", w.prompts({"messages": [ASK, ANSWER]}), "data.max_length=2"],
        ("no prompt has a trained token", "1 dropped", "data.max_length"),
    ),
    BadInput(
        "two rows with one id",
        _rows({"id": "a", **GOOD}, {"id": "b", **GOOD}, {"id": "a", **GOOD}),
        ("prompts.jsonl:3", "id 'a' is also that of prompts.jsonl:1", "must be unique"),
    ),
    BadInput(
        "prompts' place holds something else",
        lambda w: ["capture", w.write("run/features/train/prompts/notes.txt", "mine") and w.prompts(GOOD)],
        ("run/features/train/prompts", "holds other files", "their own directory"),
    ),
    BadInput(
        "row with a picture",
        _turns({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ANSWER),
        ("prompts.jsonl:2: messages[0].content[1]", "image_url", "only text"),
    ),
    BadInput(
        "weight that is no yes or no",
        _turns(ASK, {**ANSWER, "weight": 0.5}),
        ("prompts.jsonl:2: messages[1].weight", "0.5", "neither 0 nor 1"),
    ),
    BadInput(
        "tool call without a name",
        _turns(ASK, {**ANSWER, "tool_calls": [{"function": {"arguments": "{}"}}]}),
        ("prompts.jsonl:2: messages[1].tool_calls[0].function.name", "missing", "a call is"),
    ),
    BadInput(
        "old function call that is text",
        _turns(ASK, {**ANSWER, "function_call": "get"}),
        ("prompts.jsonl:2: messages[1].function_call", "is a str"),
    ),
    BadInput(
        "channel unknown",
        _turns(ASK, {**ANSWER, "channel": "aside"}),
        ("prompts.jsonl:2: messages[1].channel", "'aside'", "analysis, commentary, final"),
    ),
    BadInput(
        "tools that are a name",
        _rows(GOOD, {"messages": [ASK, ANSWER], "tools": "get_weather"}),
        ("prompts.jsonl:2: tools", "is a str", "JSON text"),
    ),
    BadInput(
        "template arguments that are a list",
        _rows(GOOD, {"messages": [ASK, ANSWER], "chat_template_kwargs": [1]}),
        ("prompts.jsonl:2: chat_template_kwargs", "is a list"),
    ),
    BadInput(
        "log without an answer's message",
        _rows(GOOD, {"messages": [ASK], "choices": [{"text": "a"}]}),
        ("prompts.jsonl:2: choices[0].message", "missing", "prompt and completion"),
    ),
    BadInput(
        "results of a batch without its requests",
        _rows(GOOD, {"custom_id": "1", "response": {"status_code": 200, "body": {"choices": [{"message": ANSWER}]}}}),
        ("prompts.jsonl:2", "not the messages it answers", "custom_id"),
    ),
    BadInput(
        "call that failed",
        _rows(GOOD, {"body": {"messages": [ASK]}, "response": {"status_code": 500}}),
        ("prompts.jsonl:2: response", "failed call", "status 500"),
    ),
    BadInput("completion of nothing", _rows(GOOD, {"prompt": "a", "completion": []}), ("prompts.jsonl:2: completion",)),
    BadInput(
        "labels of the next token",
        _rows(GOOD, {"input_ids": [1, 2, 3], "labels": [-100, 3, 4]}),
        ("prompts.jsonl:2: labels[1]", "is 3 where input_ids has 2", "repeat input_ids"),
    ),
    BadInput(
        "span outside its text",
        _rows(GOOD, {"text": "hello", "spans": [[2, 9]]}),
        ("prompts.jsonl:2: spans[0]", "[2, 9]", "5 characters"),
    ),
    BadInput(
        "mapping of a key that is not ours",
        _mapped(GOOD, dialogue="messages"),
        ("data.mapping", "'dialogue' is no key", "OURS: THEIRS"),
    ),
    BadInput(
        "mapping to a key that is not there",
        _mapped({"talk": [ASK, ANSWER]}, messages="dialogue"),
        ("prompts.jsonl:1", "its keys are talk", "messages: dialogue"),
    ),
    BadInput("JSON array cut off", _file("p.json", b'[{"input_ids": [1,'), ("p.json:1", "is not JSON", "one array")),
    BadInput(
        "JSON array of numbers", _file("p.json", b"[" + _LINE + b", 7]"), ("p.json:2", "is a JSON int", "of objects")
    ),
    BadInput(
        "gzip cut off", _file("p.jsonl.gz", gzip.compress(_LINE)[:-9]), ("p.jsonl.gz", "damaged", "pack the file")
    ),
    BadInput(
        "line that unpacks to more than a row",
        _file("p.jsonl.gz", gzip.compress(b'"' + b"x" * (5 << 20) + b'"\n')),
        ("p.jsonl.gz:1", "is longer than", "split what is longer"),
    ),
    BadInput(
        "zstandard damaged",
        _file("p.jsonl.zst", zstandard.compress(_LINE)[:5] + b"\xff" * 30),
        ("p.jsonl.zst", "damaged", "pack the file"),
    ),
    BadInput("zip archive", _file("p.zip", b"PK\x03\x04" + bytes(50)), ("p.zip", "is a zip archive", "unpack it")),
    BadInput("table of text", _file("p.csv", b"a,b\n1,2\n"), ("p.csv", "is a table of text", "JSONL or parquet")),
    BadInput("parquet damaged", _file("p.parquet", b"PAR1" + bytes(90)), ("p.parquet", "damaged", "save it anew")),
    BadInput(
        "parquet of other columns", _table(essay=["a"]), ("prompts.parquet", "no column", "'essay'", "data.mapping")
    ),
    BadInput(
        "parquet of pictures", _table(messages=[b"a"]), ("prompts.parquet", "column messages has type binary", "text")
    ),
    BadInput(
        "row of a parquet file",
        _table(messages=[[ASK, ANSWER], [ASK, {"role": "x", "content": "y"}]]),
        ("prompts.parquet:2: messages[1].role", "'x'", "roles are"),
    ),
    BadInput(
        "pattern that matches nothing",
        lambda w: ["plan", w.run_file(data={"train": ["*.gone"]})],
        ("run.yaml: data.train (line ", "no file matches *.gone", "relative to"),
    ),
    BadInput(
        "hub data set with an odd name",
        _hub(hub="../x"),
        ("run.yaml: data.train.0.hub (line ", "match pattern", "../x"),
    ),
    BadInput(
        "hub data set with an unknown key",
        _hub(hub="org/name", revison="v1"),
        ("run.yaml: data.train.0.revison (line ", "did you mean 'revision'?"),
    ),
    BadInput("directory that is no dataset", _no_dataset, ("folder", "not a dataset on disk", "JSONL")),
    BadInput("directory that is empty", _empty_directory, ("folder", "holds no data files", "name a JSONL file")),
]
