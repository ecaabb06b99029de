# SPDX-License-Identifier: Apache-2.0
"""Prompts that are missing, malformed, or not for this target."""

from __future__ import annotations

import json

from bad_input import BadInput, Workshop

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
    BadInput("directory that is no dataset", _no_dataset, ("folder", "not a dataset on disk", "JSONL")),
    BadInput("directory that is empty", _empty_directory, ("folder", "holds no data files", "name a JSONL file")),
]
