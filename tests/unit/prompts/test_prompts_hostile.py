# SPDX-License-Identifier: Apache-2.0
"""Rows that nobody honest writes: refused with file and row, in little memory, and without asking anybody."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, RenderedText
from specforge_core.prompts.conversation import Conversation
from specforge_core.prompts.masking.encoder import ConversationEncoder
from specforge_core.prompts.reading.raw_rows import MAX_ROW_BYTES
from specforge_core.prompts.reading.rows import BadRow, read_rows
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.tokenizer import load_tokenizer

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the draft"}]
TOKENS = {"input_ids": [5, 6], "loss_mask": [0, 1]}
GOOD = json.dumps(TOKENS)


def rows(path: Path) -> list[Any]:
    """All rows; the first bad one is an error."""
    found = []
    for row in read_rows([path]):
        if isinstance(row, BadRow):
            raise row.error
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "is not JSON: nested too deeply"),
        ('{"a": ' * 100_000, "is not JSON: nested too deeply"),
        ('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"id": ' + "9" * 100_000 + "}", "is not JSON"),
        ('{"input_ids": [1], "loss_mask": [1], "loss_mask": [0]}', "key 'loss_mask' stands twice"),
        ('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}', "key 'role' stands twice"),
        ('{"input_ids": [1.5], "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": [true], "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": ["1"], "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": [[1]], "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": [-1], "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": {"a": 1}, "loss_mask": [1]}', "is not a list of token ids"),
        ('{"input_ids": [1], "loss_mask": [[1]]}', "not a list of 0 and 1"),
        ('{"input_ids": [1], "loss_mask": ["1"]}', "not a list of 0 and 1"),
        ('{"messages": {"role": "user"}}', "is not a list of turns"),
        ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role"),
        ('{"messages": [{"role": "user", "content": {"a": 1}}]}', "is missing or not text"),
        ('{"\\u001b[2J": 1}', "its keys are '\\x1b[2J'"),
        (json.dumps({f"k{n}": 1 for n in range(100_000)}), "its keys are k0"),
        (json.dumps({"messages": [TALK[0]] * 5000}), "holds 5000 turns"),
    ],
)
def test_a_hostile_row_is_an_error_that_names_it(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError) as caught:
        rows(tmp_path / "x.jsonl")
    assert message in str(caught.value)
    assert "x.jsonl:2" in caught.value.where
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("given", [[1], {"a": 1}, None, "../x", "x" * 200, "\ud800", ".hidden", "a/b", "a\n"])
def test_an_id_that_is_no_file_name_is_replaced(tmp_path: Path, given: object) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({**TOKENS, "id": given}))
    assert [row.prompt_id for row in rows(tmp_path / "x.jsonl")] == ["x-00000"]


def test_a_line_without_end_is_refused_after_its_limit(tmp_path: Path) -> None:
    with (tmp_path / "x.jsonl").open("wb") as file:
        file.write(f"{GOOD}\n".encode() + b'{"messages": "')
        file.truncate(1 << 36)
    with pytest.raises(DataError, match=rf"x\.jsonl:2: is longer than {MAX_ROW_BYTES} bytes"):
        rows(tmp_path / "x.jsonl")


MEASURE = """
import json, resource, sys
from pathlib import Path
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import SilentProgress, SpecForgeError
from specforge_core.prompts.prepare import prepare_prompts
from specforge_hf_target.config import HfTargetConfig
from specforge_hf_target.tokenizer import load_tokenizer
source = Path(sys.argv[1])
tokenizer = load_tokenizer(HfTargetConfig(name="hf", path=sys.argv[2]))
settings = DataSection(train=[source], max_length=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    prepared = prepare_prompts([source], directory=source.with_suffix(""), tokenizer=lambda: tokenizer,
        settings=settings, vocab_size=10**6, progress=SilentProgress())
    print(sum(prepared[0].loss_mask))
except SpecForgeError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def measured(source: Path, target: Path) -> tuple[str, int]:
    """What became of the source, and how many MB it took."""
    command = [sys.executable, "-c", MEASURE, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    *said, grown = done.stdout.splitlines()
    return said[-1], int(grown)


@pytest.mark.parametrize(
    ("characters", "message"), [(1 << 20, "5"), (4 * 10**6, "5"), (10**7, "longer"), (10**8, "longer")]
)
def test_a_long_row_is_read_or_refused_in_little_memory(tiny_model, tmp_path, characters: int, message: str) -> None:
    source = tmp_path / "x.jsonl"
    turns = [TALK[0], {"role": "assistant", "content": "stone " * (characters // 6)}]
    source.write_text(json.dumps({"messages": turns}))
    said, grown = measured(source, tiny_model.path)
    assert message in said
    assert grown < 1000


def test_a_template_that_multiplies_is_refused(tiny_model) -> None:
    class Multiplying:
        def __init__(self) -> None:
            self._inner = load_tokenizer(HfTargetConfig(name="hf", path=str(tiny_model.path)))

        def render(self, messages: Any, **options: Any) -> RenderedText:
            text = self._inner.render(messages, **options).text
            return RenderedText(text * (1 if len(text) < 1000 else 1000))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    talk = [TALK[0], {"role": "assistant", "content": "stone " * 3000}]
    with pytest.raises(DataError, match=r"row 1: the chat template makes \d+ characters"):
        ConversationEncoder(Multiplying(), DataSection(train=["x"])).encode(Conversation(talk), where="row 1")


def save(directory: Path, **columns: pa.Array) -> Path:
    """A dataset on disk with these columns, whatever they are."""
    datasets.Dataset.from_list([TOKENS]).save_to_disk(directory)
    [name] = [path for path in directory.iterdir() if path.suffix == ".arrow"]
    table = pa.table(columns)
    name.unlink()
    with pa.OSFile(str(name), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return directory


def test_pictures_are_neither_fetched_nor_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        paths = [address, str(tmp_path / "pipe"), "/etc/hostname"]
        pictures = pa.array([{"bytes": None, "path": path} for path in paths])
        directory = save(tmp_path / "ds", messages=pa.array([TALK] * 3), picture=pictures, sound=pictures)
        info = json.loads((directory / "dataset_info.json").read_text())
        info["features"] = {"picture": {"_type": "Image"}, "sound": {"_type": "Audio"}, "messages": {"_type": "Video"}}
        (directory / "dataset_info.json").write_text(json.dumps(info))
        assert [row.conversation.messages for row in rows(directory)] == [TALK] * 3
        with pytest.raises(TimeoutError):
            listener.accept()


@pytest.mark.parametrize("info", ["", "[" * 100_000, "{}", '{"features": {"messages": {"_type": "os.system"}}}'])
def test_what_a_dataset_says_of_itself_is_not_believed(tmp_path: Path, info: str) -> None:
    directory = save(tmp_path / "ds", messages=pa.array([TALK]))
    (directory / "dataset_info.json").write_text(info)
    (directory / "ds.py").write_text("raise SystemExit('ran')")
    assert len(rows(directory)) == 1


@pytest.mark.parametrize(
    "name", ["../x/data.arrow", "/etc/hostname", "..", "", "a/b.arrow", "gone.arrow", 7, None, "a\0b"]
)
def test_files_outside_a_dataset_are_not_opened(tmp_path: Path, name: object) -> None:
    directory = save(tmp_path / "ds", messages=pa.array([TALK]))
    shutil.copytree(directory, tmp_path / "x")
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError):
        rows(directory)


@pytest.mark.parametrize("state", ["", "[]", "{}", "[" * 100_000, '{"_data_files": 1}', '{"_data_files": [1]}'])
def test_a_damaged_state_is_an_error(tmp_path: Path, state: str) -> None:
    directory = save(tmp_path / "ds", messages=pa.array([TALK]))
    (directory / "state.json").write_text(state)
    with pytest.raises(DataError):
        rows(directory)


def test_a_link_in_a_dataset_is_not_followed(tmp_path: Path) -> None:
    directory = save(tmp_path / "ds", messages=pa.array([TALK]))
    [path] = [path for path in directory.iterdir() if path.suffix == ".arrow"]
    path.rename(tmp_path / "elsewhere.arrow")
    path.symlink_to(tmp_path / "elsewhere.arrow")
    with pytest.raises(DataError, match="symbolic link"):
        rows(directory)


@pytest.mark.parametrize("part", range(0, 100, 4))
def test_a_damaged_arrow_file_is_an_error_or_other_rows(tmp_path: Path, part: int) -> None:
    directory = save(tmp_path / "ds", messages=pa.array([TALK] * 20), id=pa.array([str(n) for n in range(20)]))
    [path] = [path for path in directory.iterdir() if path.suffix == ".arrow"]
    content = bytearray(path.read_bytes())
    at = len(content) * part // 100
    for changed in (content[:at], content[:at] + b"\xff" * 8 + content[at + 8 :]):
        path.write_bytes(changed)
        with suppress(DataError):  # nothing else comes out
            rows(directory)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x"]).dictionary_encode(),
        pa.array([b"x"], pa.binary()),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        pa.array([0], pa.timestamp("s")),
        pa.RunEndEncodedArray.from_arrays([1], ["x"]),
        pa.array([[[1]]], pa.list_(pa.list_(pa.int64(), 1))),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_a_column_of_another_type_is_an_error(tmp_path: Path, column: pa.Array) -> None:
    with pytest.raises(DataError, match="column messages has type"):
        rows(save(tmp_path / "ds", messages=column))


def test_a_row_of_a_thousand_million_entries_is_refused_unread(tmp_path: Path) -> None:
    count = 10**9
    offsets = pa.py_buffer((0).to_bytes(4, "little") + count.to_bytes(4, "little"))
    column = pa.ListArray.from_buffers(pa.list_(pa.null()), 1, [None, offsets], children=[pa.nulls(count)])
    with pytest.raises(DataError, match="ds:1: the row holds more than"):
        rows(save(tmp_path / "ds", input_ids=column))


def test_a_dataset_without_a_column_of_prompts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no column that a row is read from"):
        rows(save(tmp_path / "ds", essay=pa.array(["x"])))


def test_only_what_was_asked_for_is_read_of_many_batches(tmp_path: Path) -> None:
    talks = [{"id": f"t{number}", "messages": TALK, "other": "x" * 100} for number in range(2500)]
    datasets.Dataset.from_list(talks).shuffle(seed=1).save_to_disk(tmp_path / "ds", num_shards=2)
    found = rows(tmp_path / "ds")
    assert len({row.prompt_id for row in found}) == 2500
    assert all(row.conversation.messages == TALK for row in found)
