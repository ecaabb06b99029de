# SPDX-License-Identifier: Apache-2.0
"""A directory of features that others can write into: what they plant leads nowhere, and hostile files are errors."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import AccessDenied, FeatureCorrupt, PartContext, SampleRef, SpecForgeError, StoreError
from specforge_core.features.file_store import FileStore
from specforge_core.features.sample_file import MAX_GENERATION
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import assert_same, make_sample

torch.set_num_threads(1)
MINE = b"this belongs to somebody, and lies outside of the store"


def open_store(directory: Path, token: str | None = None, capacity_bytes: int | None = None) -> FileStore:
    config = FileStoreConfig(name="file", path=directory, capacity_bytes=capacity_bytes)
    return FileStore(config, PartContext(run_id="run", directory=directory, token=token))


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of somebody's; it is as it was when the test ends."""
    outside = tmp_path / "outside"
    outside.mkdir()
    names = ["mine", "p1.e0.safetensors", f"{os.uname().nodename}.0", "elsewhere.0", ".access"]
    for name in names:
        (outside / name).write_bytes(MINE)
        os.utime(outside / name, (0, 0))
    yield outside
    assert sorted(path.name for path in outside.iterdir()) == sorted(names)
    for name in names:
        assert (outside / name).read_bytes() == MINE
        assert (outside / name).stat().st_mtime == 0


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "mine")


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "not there")


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "mine", path)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(MINE)


def folder_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def circle(path: Path, outside: Path) -> None:
    path.symlink_to(path)


PLANTS = [link, link_to_nothing, hard_link, pipe, folder, folder_link, circle]


def use(directory: Path, token: str | None) -> list[str]:
    """Everything that a run does with a store; the errors it met."""
    errors = []

    def attempt(act: Callable[[], object]) -> object:
        try:
            return act()
        except SpecForgeError as error:
            errors.append(str(error))
            return None

    store = attempt(lambda: open_store(directory, token))
    if not isinstance(store, FileStore):
        return errors
    for number in range(1, 4):
        ref = attempt(lambda number=number: store.put(f"p{number}.e0", make_sample(number)))  # type: ignore[misc]
        if isinstance(ref, SampleRef):
            assert_same(store.get(ref), make_sample(number))
            attempt(lambda ref=ref: store.delete(ref) if ref.sample_id == "p3.e0" else None)  # type: ignore[misc]
    attempt(store.usage)
    attempt(store.close)
    return errors


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", [".counts", ".access", ".aside", "p1", "p1's folder"])
@pytest.mark.parametrize("token", [None, "sixteen characters or more"], ids=["open", "guarded"])
def test_what_is_planted_leads_nowhere(
    tmp_path: Path, outside: Path, plant: Callable[[Path, Path], None], name: str, token: str | None
) -> None:
    whole = open_store(tmp_path / "whole").put("p1.e0", make_sample(1))
    (place,) = (tmp_path / "whole").rglob("p1.e0.safetensors")
    directory = tmp_path / "store"
    names = {"p1": f"{place.parent.name}/{whole.sample_id}.safetensors", "p1's folder": place.parent.name}
    path = directory / names.get(name, name)
    path.parent.mkdir(parents=True)
    plant(path, outside)
    errors = use(directory, token)
    if name == "p1" and plant is hard_link and token:
        assert "put without a token" in errors[0]  # it is a file, for all that is known
    elif errors:
        assert any(str(path) in error for error in errors) or name == ".access", errors
        assert name != "p1" or plant is folder  # everything else was replaced


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_is_planted_while_the_store_is_open_leads_nowhere(
    tmp_path: Path, outside: Path, plant: Callable[[Path, Path], None]
) -> None:
    for name in (".counts", ".aside", "folder", "sample"):
        directory = tmp_path / f"store {name}"
        store = open_store(directory)
        ref = store.put("p1.e0", make_sample(1))
        (sample,) = directory.rglob("p1.e0.safetensors")
        path = {"folder": sample.parent, "sample": sample}.get(name, directory / name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        plant(path, outside)
        for act in (lambda: store.get(ref), lambda: store.delete(ref), store.sync, store.usage):  # noqa: B023
            try:
                act()
            except StoreError as error:
                assert str(directory) in str(error)  # noqa: PT017
        try:
            store.put("p1.e0", make_sample(1))
        except StoreError as error:
            assert str(directory) in str(error)  # noqa: PT017


def test_a_link_in_place_of_a_sample_is_corrupt_and_is_replaced(tmp_path: Path, outside: Path) -> None:
    store = open_store(tmp_path / "s")
    ref = store.put("p1.e0", make_sample(1))
    (path,) = (tmp_path / "s").rglob("p1.e0.safetensors")
    copy = shutil.move(path, tmp_path / "moved")
    path.symlink_to(copy)
    with pytest.raises(FeatureCorrupt, match="symbolic link"):
        store.get(ref)
    store.delete(ref)
    assert path.is_symlink()
    assert_same(store.get(store.put("p1.e0", make_sample(1))), make_sample(1))
    assert not path.is_symlink()
    assert copy.exists()


def test_samples_behind_a_linked_folder_are_neither_counted_nor_read(tmp_path: Path) -> None:
    other = open_store(tmp_path / "other")
    ref = other.put("p1.e0", make_sample(1))
    (path,) = (tmp_path / "other").rglob("p1.e0.safetensors")
    directory = tmp_path / "store"
    directory.mkdir()
    (directory / path.parent.name).symlink_to(path.parent)
    store = open_store(directory)
    assert (store.usage().samples, store.usage().nbytes) == (0, 0)
    with pytest.raises(StoreError, match="symbolic link"):
        store.get(ref)
    with pytest.raises(StoreError, match="symbolic link"):
        store.delete(ref)
    assert_same(other.get(ref), make_sample(1))


def test_what_is_no_sample_is_not_counted(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "s" / "ab").mkdir(parents=True)
    for plant in (link, pipe, folder, folder_link):
        plant(tmp_path / "s" / "ab" / f"{plant.__name__}.safetensors", outside)
    (tmp_path / "s" / "cd").write_bytes(MINE)
    (tmp_path / "s" / "zz").mkdir()
    (tmp_path / "s" / "zz" / "a.safetensors").write_bytes(MINE)
    assert open_store(tmp_path / "s").usage().samples == 0


def test_what_was_planted_aside_stays(tmp_path: Path, outside: Path) -> None:
    aside = tmp_path / "s" / ".aside"
    aside.mkdir(parents=True)
    machine = os.uname().nodename
    for number, plant in enumerate((link, pipe, folder, folder_link)):
        plant(aside / f"{machine}.{number}", outside)
    assert use(tmp_path / "s", None) == []
    assert len(list(aside.iterdir())) == 4


def test_the_configured_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "chosen").symlink_to(tmp_path / "disk")
    store = open_store(tmp_path / "chosen")
    assert_same(store.get(store.put("p1.e0", make_sample(1))), make_sample(1))
    assert list((tmp_path / "disk").rglob("p1.e0.safetensors"))


def test_the_directory_that_nobody_chose_is_no_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "store").symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        FileStore(FileStoreConfig(name="file"), PartContext(run_id="run", directory=tmp_path / "run"))


def test_a_directory_that_everybody_writes_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_store(tmp_path / "open").put("p1.e0", make_sample(1))
        open_store(tmp_path / "own").put("p1.e0", make_sample(1))
    (told,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "open") in told
    assert "plant" in told


def test_nothing_is_made_that_everybody_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        open_store(tmp_path / "s", token="secret").put("p1.e0", make_sample(1))
    finally:
        os.umask(before)
    for path in (tmp_path / "s").rglob("*"):
        assert not path.stat().st_mode & 0o002, path


def header(**changes: object) -> dict[str, object]:
    """Of a sample of three tokens; its file has 24 bytes of tensors."""
    metadata = {"specforge": "2", "sample_id": "p1.e0", "prompt_id": "p", "epoch": "0", "norm": "", "checksum": "0"}
    entry = {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}
    whole = {"input_ids": entry, "__metadata__": {**metadata, "generation": "0" * 18 + "1"}}
    return {**whole, **changes}


def metadata(**changes: object) -> dict[str, object]:
    return header(__metadata__={**header()["__metadata__"], **changes})  # type: ignore[dict-item]


def entry(**changes: object) -> dict[str, object]:
    return header(input_ids={**header()["input_ids"], **changes})  # type: ignore[dict-item]


HEADERS = [
    None,
    12345678,
    "text",
    [],
    [["input_ids", {}]],
    {},
    header(input_ids=None),
    header(input_ids=[1, 2]),
    header(input_ids="x"),
    header(other={"dtype": "I64", "shape": [3], "data_offsets": [0, 24]}),
    header(other={"dtype": "I64", "shape": [3], "data_offsets": [12, 36]}),
    header(other=None),
    header(__metadata__=None),
    header(__metadata__=[]),
    header(__metadata__="text"),
    entry(shape=None),
    entry(shape=[1e30]),
    entry(shape=[3.0]),
    entry(shape=[-3]),
    entry(shape=[True, 3]),
    entry(shape=[10**30]),
    entry(shape=[0, 10**30], data_offsets=[0, 0]),
    entry(shape=[1] * 5000 + [3]),
    entry(shape="3"),
    entry(shape={"3": 3}),
    entry(dtype=["I64"]),
    entry(dtype={}),
    entry(dtype="I65"),
    entry(dtype=None),
    entry(data_offsets=[0, 1e30]),
    entry(data_offsets=[0, 24.0]),
    entry(data_offsets=[-24, 0]),
    entry(data_offsets=[24, 0]),
    entry(data_offsets=[0, 24, 48]),
    entry(data_offsets=[False, 24]),
    entry(data_offsets=None),
    entry(data_offsets={}),
    *(metadata(generation=text) for text in ("", "-1", "+1", "1_0", " 1", "1.0", "٣", "1" * 5000, 1, None, [], {})),
    *(metadata(generation=str(number)) for number in (2**62 + 1, 2**63 - 1, 2**63, 10**30)),
    *(metadata(epoch=text) for text in ("", "-1", "1_0", "9" * 5000, 0, None)),
    *(
        metadata(**{key: value})
        for key in ("norm", "sample_id", "checksum", "specforge")
        for value in (None, [], 7, {})
    ),
]
TEXTS = [
    *(json.dumps(value).encode() for value in HEADERS),
    b"[" * 20_000,
    b'{"a":' * 20_000,
    b"{" * 500_000,
    b"\xff" * 100,
    b"\0" * 100,
    json.dumps(header()).encode()[:-1] + b',"input_ids":{"dtype":"I64","shape":[3],"data_offsets":[0,24]}}',
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_hostile_header_is_corrupt_and_is_replaced(tmp_path: Path, text: bytes) -> None:
    store = open_store(tmp_path)
    ref = store.put("p1.e0", make_sample(1))
    (path,) = tmp_path.rglob("p1.e0.safetensors")
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(FeatureCorrupt, match=re.escape(str(path))) as raised:
        store.get(ref)
    assert len(str(raised.value)) < 2000
    again = store.put("p1.e0", make_sample(1))
    assert again.generation > ref.generation
    assert_same(store.get(again), make_sample(1))
    assert open_store(tmp_path).usage() == store.usage()


@pytest.mark.parametrize("number", [2**53, 2**61, 2**61 + 1, 2**62 - 1, 2**62, 2**63 - 2, 2**63 - 1, 10**19 - 1])
def test_a_planted_generation_poisons_nothing(tmp_path: Path, number: int) -> None:
    store = open_store(tmp_path)
    ref = store.put("p1.e0", make_sample(1))
    (path,) = tmp_path.rglob("p1.e0.safetensors")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"%019d"' % ref.generation, b'"%019d"' % number))
    for _ in range(3):
        for name in ("p1", "p2"):
            again = store.put(f"{name}.e0", make_sample(1 if name == "p1" else 2))
            assert 0 < again.generation < MAX_GENERATION
            assert store.get(again).prompt_id
        path.write_bytes(content.replace(b'"%019d"' % ref.generation, b'"%019d"' % number))
        store = open_store(tmp_path)


def test_a_claim_of_much_memory_takes_none(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("p1.e0", make_sample(1))
    (path,) = tmp_path.rglob("p1.e0.safetensors")
    text = json.dumps(entry(shape=[1 << 37], data_offsets=[0, 1 << 40])).encode()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, before[1]))
    try:
        for nbytes in (24, 1 << 30):
            path.write_bytes(struct.pack("<Q", len(text)) + text)
            os.truncate(path, 8 + len(text) + nbytes)
            with pytest.raises(FeatureCorrupt):
                store.get(ref)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


COUNTS = [
    (-1, -1, -1, -1),
    (2**63 - 1,) * 4,
    (2**63 - 2, 2**63 - 1, 1, 1),
    (5, 4, 1, 100),
    (0, 0, -5, 0),
    (0, 0, 0, -(2**63)),
    (2**61 + 1, 2**61 + 1, 0, 0),
]


@pytest.mark.parametrize("content", [*(struct.pack("<4q", *row) for row in COUNTS), b"", b"x", b"\xff" * 100])
@pytest.mark.parametrize("opened", [True, False], ids=["while it is open", "before it is opened"])
def test_a_hostile_count_is_counted_again(tmp_path: Path, content: bytes, opened: bool) -> None:
    store = open_store(tmp_path, capacity_bytes=1 << 20)
    refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(4)]
    before = store.usage()
    (tmp_path / ".counts").write_bytes(content)
    if not opened:
        store = open_store(tmp_path, capacity_bytes=1 << 20)
    assert store.usage() == before
    store.delete(refs[0])
    assert store.usage().samples == 3
    again = store.put("p0.e0", make_sample(0))
    assert again.generation > refs[-1].generation
    assert store.usage() == before


def test_the_highest_believed_counts_do_not_overflow(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / ".counts").write_bytes(struct.pack("<4q", *(2**61,) * 4))
    refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(4)]
    assert [store.get(ref).epoch for ref in refs] == [0] * 4
    assert open_store(tmp_path).usage().samples == 4


def test_huge_planted_files_do_not_overflow_the_counts(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for name in ("a", "b"):
        with (tmp_path / "ab" / f"{name}.safetensors").open("wb") as file:
            file.truncate(1 << 43)
    store = open_store(tmp_path)
    assert store.usage().nbytes == 2 << 43
    store.put("p1.e0", make_sample(1))


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff" * 4097, b":", b"a:b:c", "é:ü".encode()])
def test_a_garbage_proof_lets_nobody_in(tmp_path: Path, content: bytes) -> None:
    open_store(tmp_path).put("p1.e0", make_sample(1))
    (tmp_path / ".access").write_bytes(content)
    for token in (None, "secret"):
        with pytest.raises((AccessDenied, StoreError), match=str(tmp_path)):
            open_store(tmp_path, token=token)


def test_a_huge_proof_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / ".access").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(StoreError, match="longer"):
        open_store(tmp_path, token="secret")
