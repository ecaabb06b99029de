# SPDX-License-Identifier: Apache-2.0
"""Files in every format, written with the usual library for each, and every way in which one cannot be read."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import zstandard
from pyarrow import feather, parquet
from specforge_core.contracts import DataError
from specforge_core.prompts.reading import json_array, json_rows
from specforge_core.prompts.reading.raw_rows import MAX_ROW_BYTES
from specforge_core.prompts.reading.rows import BadRow, read_rows
from specforge_core.prompts.reading.sources import find_files, read_records

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TALKS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello. é"}]},
    {
        "id": "b",
        "messages": [
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "name": "f"},
            {"role": "assistant", "content": "Three."},
        ],
    },
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TALKS).encode()
ARRAY = json.dumps(TALKS, indent=2).encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist([{**row, "source": "web"} for row in TALKS]), path)


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(TALKS)
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path) -> None:
    feather.write_feather(pa.Table.from_pylist(TALKS), path)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "blank.jsonl": lambda path: path.write_bytes(b"\n" + LINES.replace(b"\n", b"\r\n\r\n")),
    "lines.json": lambda path: path.write_bytes(LINES),
    "array.json": lambda path: path.write_bytes(ARRAY),
    "tight array.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf " + json.dumps(TALKS).encode()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(ARRAY)),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(LINES)),
    "two frames.jsonl.zstd": lambda path: path.write_bytes(
        b"".join(zstandard.compress(line) for line in LINES.splitlines(keepends=True))
    ),
    "array.json.zst": lambda path: path.write_bytes(zstandard.compress(ARRAY)),
    "packed, and not named so": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.parquet": write_parquet,
    "a.feather": write_feather,
    "a.arrow": write_stream,
    "dataset": lambda path: datasets.Dataset.from_list(TALKS).save_to_disk(path),
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    rows = list(read_rows([tmp_path / name]))
    assert [row.prompt_id for row in rows] == ["a", "b"]
    assert [row.conversation.messages for row in rows] == [row["messages"] for row in TALKS]
    assert {key for row in rows for key in row.unused} == ({"source"} if name == "a.parquet" else set())


def test_rows_are_named_by_line_or_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n" + LINES)
    (tmp_path / "a.json").write_bytes(ARRAY)
    assert [record.number for record in read_records(tmp_path / "a.jsonl")] == [2, 3]
    assert [record.number for record in read_records(tmp_path / "a.json")] == [1, 2]


def test_folders_and_patterns_are_their_files_in_order(tmp_path: Path) -> None:
    for name in ("data/b.jsonl", "data/a.parquet", "data/deep/c.json.gz", "data/dataset", "more/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        FORMATS[{"b": "a.jsonl", "a": "a.parquet", "c": "array.json.gz"}.get(Path(name).stem[:1], "dataset")](
            tmp_path / name
        )
    for name in ("data/README.md", "data/.hidden.jsonl", "data/dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    folder = [file.name.removeprefix(f"{tmp_path}/") for file in find_files([tmp_path / "data"])]
    assert folder == ["data/a.parquet", "data/b.jsonl", "data/dataset", "data/deep/c.json.gz"]
    found = find_files([tmp_path / "*" / "b.jsonl", tmp_path / "data" / "deep"])
    assert [(file.path.parent.name, file.label) for file in found] == [("data", "b"), ("more", "b.2"), ("deep", "c")]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(LINES)
    assert len(list(read_rows([tmp_path / "a[1].jsonl"]))) == 2


def test_null_keys_of_tables_are_not_there_and_text_columns_hold_json(tmp_path: Path) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "f", "default": None}}])
    table = pa.Table.from_pylist([{**row, "tools": tools} for row in TALKS])
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(read_rows([tmp_path / "a.parquet"]))
    assert rows[1].conversation.messages == TALKS[1]["messages"]
    assert rows[0].conversation.tools == json.loads(tools)


def test_a_mapped_column_is_read_of_a_table(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"log": {"talk": row["messages"]}, "picture": b"x"} for row in TALKS])
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = list(read_rows([tmp_path / "a.parquet"], {"messages": "log.talk"}))
    assert [row.conversation.messages for row in rows] == [row["messages"] for row in TALKS]
    assert rows[0].unused == {"picture"}


BAD_LINES: Mapping[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "is not JSON"),
    "a list": (b'[{"a": 1}]', "is a JSON list"),
    "not UTF-8": (b'{"a": "\xff"}', "is not UTF-8"),
    "a key twice": (b'{"a": 1, "a": 2}', "stands twice"),
    "nested": (b'{"a": ' * 100_000, "nested too deeply"),
    "too long": (b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}', "is longer than"),
    "not understood": (b'{"foo": 1}', "has none of messages"),
    "another's id": (json.dumps(TALKS[0]).encode(), "id 'a' is also that of"),
}


@pytest.mark.parametrize("case", list(BAD_LINES))
def test_a_bad_line_is_one_and_those_after_it_are_read(case: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[case]
    first, second = LINES.splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_bytes(first + line + b"\n" + second)
    rows = list(read_rows([tmp_path / "x.jsonl"]))
    assert [type(row).__name__ for row in rows] == ["SourceRow", "BadRow", "SourceRow"]
    bad = rows[1]
    assert isinstance(bad, BadRow)
    assert (bad.where, message in str(bad.error)) == (f"{tmp_path / 'x.jsonl'}:2", True)
    assert bad.error.where.startswith(bad.where)
    assert bad.error.hint


def test_a_bad_element_of_an_array_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(f'[{{"a": 1, "a": 2}}, 7, {json.dumps(TALKS[0])}]')
    twice, number, good = read_rows([tmp_path / "x.json"])
    assert "x.json:1: is not JSON: key 'a' stands twice" in str(twice.error)
    assert "x.json:2: is a JSON int" in str(number.error)
    assert good.prompt_id == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "the file ends inside the array"),
        (b"[]", "holds no prompts"),
        (b'[{"a": 1}', "x.json:1: is not JSON: the file ends where ','"),
        (b'[{"a": 1} {"a": 2}]', "x.json:1: is not JSON: '{' stands where ','"),
        (b'[{"a": 1},]', "x.json:2: is not JSON"),
        (b'[{"a": 1}] x', "x.json:1: is not JSON: 'x' stands after the end"),
        (b'[{"a": tru}' + b" " * 100 + b"]", "x.json:1: is not JSON"),
        (b'[{"a": "x', "x.json:1: is not JSON: Unterminated string"),
        (b"[" * 100_000, "x.json:1: is not JSON: nested too deeply"),
        (b'["' + b"x" * (MAX_ROW_BYTES + 9) + b'"]', "x.json:1: is longer than"),
        (b'[{"a": "\xff"}]', "is not UTF-8"),
        (b"[" + b"9" * 10_000 + b"]", "x.json:1: is not JSON: Exceeds the limit"),
        (b"[" + b" " * (MAX_ROW_BYTES + (1 << 17)) + b"]", "spaces one after the other"),
    ],
)
def test_an_array_that_cannot_be_read_on_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows([tmp_path / "x.json"]))
    assert message in str(caught.value)


def test_an_array_is_read_whatever_the_pieces_it_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"n": 10**n, "t": 'é"\\[]{},' * n, "u": [True, None, -1.5e3]} for n in range(12)]
    for ensure_ascii in (True, False):
        (tmp_path / "x.json").write_text(json.dumps(values, ensure_ascii=ensure_ascii))
        for size in (1, 2, 3, 7, 64):
            monkeypatch.setattr(json_array, "_CHUNK", size)
            assert [record.content for record in read_records(tmp_path / "x.json")] == values


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
@pytest.mark.parametrize("begin", [b'{"a": "', b'["'])
def test_what_unpacks_to_a_gigabyte_is_refused_at_the_limit_of_a_row(
    pack: Callable[[bytes], bytes], begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(pack(begin + b"x" * (1 << 28)))
    monkeypatch.setattr(json_rows, "_MAX_SKIPPED_BYTES", 2 * MAX_ROW_BYTES)
    with pytest.raises(DataError, match=r"x\.jsonl\.gz:1: is longer than"):
        list(read_rows([tmp_path / "x.jsonl.gz"]))


def spoilt(content: bytes) -> bytes:
    return content[: len(content) // 2] + b"\xff" * 8 + content[len(content) // 2 + 8 :]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", None, "there is no such file"),
        ("x.jsonl", b"", "holds no prompts"),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "is damaged"),
        ("x.jsonl.gz", spoilt(gzip.compress(LINES, mtime=0)), "is damaged"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), "holds no prompts"),
        ("x.jsonl.zst", spoilt(zstandard.compress(LINES)), "is damaged"),
        ("x.parquet", LINES, "is damaged"),
        ("x.parquet", b"PAR1" + b"\0" * 100, "is damaged"),
        ("x.feather", b"ARROW1" + b"\0" * 100, "is damaged"),
        ("x.arrow", b"\xff\xff\xff\xff" + b"\0" * 100, "is damaged|has no column"),
        ("x.feather", b"FEA1" + b"\0" * 100, "is a Feather file of version 1.*version 2"),
        ("x.zip", b"PK\x03\x04" + b"\0" * 100, "is a zip archive.*unpack it"),
        ("x.jsonl.bz2", b"BZh9" + b"\0" * 100, "is packed with bzip2"),
        ("x.jsonl.xz", b"\xfd7zXZ\0" + b"\0" * 100, "is packed with xz"),
        ("x.csv", b"a,b\n1,2\n", "is a table of text"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_that_names_it(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows([tmp_path / name]))
    assert name in caught.value.where
    assert caught.value.hint


def test_a_pattern_that_matches_nothing_and_a_pipe_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.jsonl: no file matches"):
        find_files([tmp_path / "*.jsonl"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is no regular file"):
        list(read_rows([tmp_path / "pipe"]))
    with pytest.raises(DataError, match="holds no data files"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="no prompts are given"):
        find_files([])


def test_a_blank_file_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_MAX_BLANK_LINES", 10)
    (tmp_path / "x.jsonl").write_bytes(b"\n" * 100)
    with pytest.raises(DataError, match="blank lines one after the other"):
        list(read_rows([tmp_path / "x.jsonl"]))


@pytest.mark.parametrize(
    ("package", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet"), ("pyarrow", "dataset")]
)
def test_a_missing_package_is_named(package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FORMATS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the {package} package .*pip install 'specforge-core\[datasets\]'"):
        list(read_rows([tmp_path / name]))


def test_a_mapping_to_what_is_not_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.mapping: 'mesages' is no key"):
        list(read_rows([tmp_path / "x"], {"mesages": "talk"}))


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow"])
def test_a_damaged_table_is_an_error_or_other_rows(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for at in range(0, len(content), max(1, len(content) // 60)):
        for changed in (content[:at], content[:at] + b"\xff" * 4 + content[at + 4 :]):
            (tmp_path / name).write_bytes(changed)
            with suppress(DataError):  # nothing else comes out
                list(read_rows([tmp_path / name]))


def test_a_parquet_column_of_another_type_is_an_error(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"messages": pa.array([b"x"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column messages has type binary"):
        list(read_rows([tmp_path / "a.parquet"]))
