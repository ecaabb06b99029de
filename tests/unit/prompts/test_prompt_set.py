# SPDX-License-Identifier: Apache-2.0
"""Prepared prompts that a disk damaged or somebody altered are noticed, and a failed preparation leaves nothing."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import DataError, Prompt, SilentProgress
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_manifest import ARRAYS, make_manifest
from specforge_core.prompts.prompt_set import PromptSet, write_prompt_set
from xxhash import xxh3_128_hexdigest

PROMPTS = [Prompt("a", [1, 2, 3], [0, 1, 1]), Prompt("b", [4, 5], [0, 1]), Prompt("c", [6], [1])]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_prompt_set(tmp_path / "set", PROMPTS, fingerprint="f")
    return tmp_path / "set"


def altered(prepared: Path, **files: bytes) -> Path:
    """The set with other files, and a manifest that agrees with them: what an attacker can do, not a disk."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    for key, content in files.items():
        [name] = [name for name in ARRAYS if name.startswith(key)]
        (prepared / name).write_bytes(content)
        manifest["sizes"][name], manifest["digests"][name] = len(content), xxh3_128_hexdigest(content)
    return rewritten(prepared, manifest)


def rewritten(prepared: Path, manifest: dict[str, Any]) -> Path:
    manifest.pop("digest", None)
    (prepared / "manifest.json").write_text(make_manifest(manifest))
    return prepared


@pytest.mark.parametrize("name", [*ARRAYS, "manifest.json"])
@pytest.mark.parametrize("change", ["a bit", "cut", "extended", "gone", "empty", "a link", "a pipe", "a directory"])
def test_whatever_happens_to_a_file_is_noticed(prepared: Path, name: str, change: str) -> None:
    path = prepared / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.unlink()
    if change == "a link":
        (prepared.parent / "elsewhere").write_bytes(content)
        path.symlink_to(prepared.parent / "elsewhere")
    elif change == "a pipe":
        os.mkfifo(path)
    elif change == "a directory":
        path.mkdir()
    elif change != "gone":
        bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"a bit": bit, "cut": content[:-2], "extended": content + b"\0", "empty": b""}[change])
    with pytest.raises(DataError) as caught:
        PromptSet.open(prepared)
    assert caught.value.hint


def test_files_that_changed_places_are_noticed(tmp_path: Path, prepared: Path) -> None:
    write_prompt_set(
        tmp_path / "other", [Prompt(p.prompt_id, p.input_ids[::-1], p.loss_mask) for p in PROMPTS], fingerprint="f"
    )
    shutil.copy(tmp_path / "other" / "input_ids.i32", prepared / "input_ids.i32")
    with pytest.raises(DataError, match=r"input_ids\.i32 was altered"):
        PromptSet.open(prepared)


@pytest.mark.parametrize(
    "files",
    [
        {"input_ids": struct.pack("6i", 1, 2, 3, -1, 5, 6)},
        {"loss_mask": bytes([0, 1, 2, 0, 1, 1])},
        {"offsets": struct.pack("4q", 0, 5, 3, 6)},
        {"offsets": struct.pack("4q", 0, 3, 3, 6)},
        {"offsets": struct.pack("4q", 0, 3, 5, 2**62)},
        {"offsets": struct.pack("4q", -3, 3, 5, 6)},
        {"offsets": struct.pack("4q", 1, 3, 5, 6)},
        {"offsets": struct.pack("3q", 0, 3, 6)},
        {"prompt_ids": b"a\nb\n"},
        {"prompt_ids": b"a\nb\nc\nd\n"},
        {"prompt_ids": b"a\na\nc\n"},
        {"prompt_ids": b"a\n\nc\n"},
        {"prompt_ids": b"a\nb\nc"},
        {"prompt_ids": b"a\n../b\nc\n"},
        {"prompt_ids": b"a\nb\0\nc\n"},
        {"prompt_ids": b"a\n..\nc\n"},
        {"prompt_ids": b"a\n\xff\nc\n"},
        {"prompt_ids": b"a\n" + b"b" * 300 + b"\nc\n"},
    ],
)
def test_arrays_that_cannot_be_are_refused_whatever_their_digests_say(prepared: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="the prepared prompts cannot be used"):
        PromptSet.open(altered(prepared, **files))


FIELDS = ["prompts", "tokens", "dropped", "fingerprint", "sizes", "digests", "tokenizer", "sources"]


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("value", [None, -1, True, 1.5, 10**30, "x", [], [1], {}, {"a": 1}])
def test_a_manifest_with_a_field_of_another_kind_is_refused(prepared: Path, key: str, value: object) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    good = {"fingerprint": "x", "tokenizer": "x", "sources": [], "dropped": 10**30}
    if good.get(key) == value and type(good.get(key)) is type(value):
        return
    with pytest.raises(DataError):
        PromptSet.open(rewritten(prepared, {**manifest, key: value}))


@pytest.mark.parametrize("key", [*FIELDS, "format", "byteorder", "digest"])
def test_a_manifest_without_a_field_is_refused(prepared: Path, key: str) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest[key]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        PromptSet.open(prepared)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "[]", "null", "\xff", '{"format": 2'])
def test_a_manifest_that_is_no_json_object_is_refused(prepared: Path, text: str) -> None:
    (prepared / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError):
        PromptSet.open(prepared)


def prepare(source: Path, directory: Path, vocab_size: int = 100) -> PromptSet:
    return prepare_prompts(
        [source],
        directory=directory,
        tokenizer=lambda: pytest.fail("no text to encode"),
        settings=DataSection(train=[source], max_length=64),
        vocab_size=vocab_size,
        progress=SilentProgress(),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input_ids": [5, 6], "loss_mask": [0, 1]}) + "\n")
    return path


def test_an_altered_set_is_prepared_anew_with_a_word(tmp_path: Path, source: Path, caplog) -> None:
    prepare(source, tmp_path / "set")
    (tmp_path / "set" / "input_ids.i32").write_bytes(struct.pack("2i", 5, 7))
    assert prepare(source, tmp_path / "set")[0].input_ids == [5, 6]
    assert "input_ids.i32 was altered; they are prepared anew" in caplog.text


def test_a_set_with_ids_beyond_the_vocabulary_is_prepared_anew(tmp_path: Path, source: Path) -> None:
    prepare(source, tmp_path / "set")
    altered(tmp_path / "set", input_ids=struct.pack("2i", 5, 100))
    assert prepare(source, tmp_path / "set")[0].input_ids == [5, 6]


def test_a_set_of_the_last_version_is_prepared_anew(tmp_path: Path, source: Path, caplog) -> None:
    prepare(source, tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    (tmp_path / "set" / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert len(prepare(source, tmp_path / "set")) == 1
    assert caplog.text == ""


def fail_once(monkeypatch: pytest.MonkeyPatch, place: object, name: str, after: int) -> None:
    """Of the calls to a function of the system's, one finds no room."""
    real, calls = getattr(place, name), itertools.count()

    def limited(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, limited)


CALLS = [*((Path, "open", count) for count in range(5)), (os, "fsync", 0), (os, "fsync", 3), (os, "rename", 0)]


@pytest.mark.parametrize(
    ("place", "name", "after", "replaced"),
    [*((*call, False) for call in CALLS), *((*call, True) for call in CALLS), (os, "rename", 1, True)],
)
def test_a_preparation_without_room_leaves_what_was_there(tmp_path, monkeypatch, place, name, after, replaced) -> None:
    directory = tmp_path / "set"
    if replaced:
        write_prompt_set(directory, PROMPTS[:1], fingerprint="old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as limited:
        fail_once(limited, place, name, after)
        with pytest.raises(DataError, match="No space left on device"):
            write_prompt_set(directory, PROMPTS, fingerprint="new")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["set"] if replaced else [])


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path: Path, source: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from specforge_core.contracts import Prompt\n"
        "from specforge_core.prompts.prompt_writer import PromptSetWriter\n"
        "writer = PromptSetWriter(Path(sys.argv[1])); writer.add(Prompt('a', [1], [1])); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "set")], check=False, timeout=120)
    assert done.returncode == 9
    (tmp_path / ".set.old.abcd1234" / "set").mkdir(parents=True)
    (tmp_path / ".set.notes").mkdir()
    (tmp_path / ".setting").mkdir()
    assert len(list(tmp_path.iterdir())) == 5
    prepare(source, tmp_path / "set")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".set.lock", ".set.notes", ".setting", "a.jsonl", "set"]


def test_a_planted_lock_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".set.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataError, match="symbolic link"):
        prepare(source, tmp_path / "set")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("a", [2**31], [1]),
        Prompt("a", [-1], [1]),
        Prompt("a", [1.5], [1]),  # type: ignore[list-item]
        Prompt("a", ["1"], [1]),  # type: ignore[list-item]
        Prompt("a", [1], [2]),
        Prompt("a", [1], [300]),
        Prompt("a", [1], [1, 1]),
        Prompt("a", [], []),
        Prompt("a\nb", [1], [1]),
        Prompt("../a", [1], [1]),
        Prompt("", [1], [1]),
        Prompt("\ud800", [1], [1]),
    ],
)
def test_what_is_no_prompt_is_not_written(tmp_path: Path, prompt: Prompt) -> None:
    with pytest.raises(DataError, match="is not a prompt"):
        write_prompt_set(tmp_path / "set", [prompt], fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_a_large_set_opens_at_the_speed_of_memory(tmp_path: Path) -> None:
    ids, mask = list(range(10_000)), [1] * 10_000
    opened = write_prompt_set(
        tmp_path / "set", (Prompt(f"p{number}", ids, mask) for number in range(1000)), fingerprint="f"
    )
    began = time.monotonic()
    assert len(PromptSet.open(tmp_path / "set")) == len(opened)
    assert time.monotonic() - began < 2  # 50 MB
