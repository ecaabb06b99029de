# SPDX-License-Identifier: Apache-2.0
"""The file store's own promises: its files, its leftovers, a full disk, several processes."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from specforge_core.contracts import FeatureCorrupt, FeatureGone, PartContext, Sample, StaleRef, StoreError, StoreFull
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import assert_same, fill_up, make_sample

torch.set_num_threads(1)


def open_store(directory: Path, capacity_bytes: int | None = None) -> FileStore:
    config = FileStoreConfig(name="file", path=directory, capacity_bytes=capacity_bytes)
    return FileStore(config, PartContext(run_id="run", directory=directory))


def files(directory: Path) -> list[Path]:
    """All but the counts."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".counts")


def test_files_are_safetensors_that_others_read(tmp_path: Path) -> None:
    sample = make_sample(3)
    open_store(tmp_path).put(sample.sample_id, sample)
    (path,) = files(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["prompt_id"] == "prompt-3"
        assert set(file.keys()) == set(sample.features)
        for name, tensor in sample.features.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_the_default_directory_is_the_contexts(tmp_path: Path) -> None:
    store = FileStore(FileStoreConfig(name="file"), PartContext(run_id="run", directory=tmp_path))
    store.put("p.e0", make_sample())
    assert [path.name for path in files(tmp_path / "store")] == ["p.e0.safetensors"]


def test_another_process_opens_what_was_put(tmp_path: Path) -> None:
    ref = open_store(tmp_path).put("p.e0", make_sample())
    other = open_store(tmp_path)
    assert_same(other.get(ref), make_sample())
    assert other.usage().samples == 1
    assert other.put("p.e0", make_sample(1)).generation > ref.generation


@pytest.mark.parametrize(
    "sample_id", ["", "..", "../x", "/x", "a/b", "a\\b", ".x", "a\0b", "a\nb", "x" * 300, "\ud800"]
)
def test_ids_that_could_leave_the_directory_are_refused(tmp_path: Path, sample_id: str) -> None:
    with pytest.raises(StoreError):
        open_store(tmp_path / "store").put(sample_id, make_sample())
    assert files(tmp_path) == []


def test_ids_of_other_scripts_are_held(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert_same(store.get(store.put("prompt é 語.e0", make_sample())), make_sample())


def test_truncation_at_every_length_is_corrupt(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("p.e0", make_sample())
    (path,) = files(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FeatureCorrupt):
            store.get(ref)
    path.write_bytes(content + b"\0")
    with pytest.raises(FeatureCorrupt):
        store.get(ref)
    path.write_bytes(content)
    assert_same(store.get(ref), make_sample())


def test_every_changed_header_byte_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("p.e0", make_sample())
    (path,) = files(tmp_path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(header):
        if content[position : position + 1] == b"\x01":
            continue
        path.write_bytes(content[:position] + b"\x01" + content[position + 1 :])
        with pytest.raises((FeatureCorrupt, StaleRef)):
            store.get(ref)


def test_features_of_another_sample_are_corrupt(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref, other = store.put("p.e0", make_sample(0)), store.put("q.e0", make_sample(1))
    first, second = (next(tmp_path.rglob(f"{r.sample_id}.safetensors")) for r in (ref, other))
    shutil.copy(second, first)
    with pytest.raises(FeatureCorrupt):
        store.get(ref)


def test_a_torn_file_does_not_reset_the_generation(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    refs = [store.put("p.e0", make_sample(number)) for number in range(3)]
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert store.put("p.e0", make_sample()).generation > refs[-1].generation


def test_delete_leaves_nothing_and_the_generation_grows_all_the_same(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    ref = first.put("p.e0", make_sample())
    first.delete(ref)
    assert files(tmp_path) == []
    again = open_store(tmp_path)
    assert again.usage().samples == 0
    with pytest.raises(FeatureGone):
        again.get(ref)
    assert again.put("p.e0", make_sample()).generation > ref.generation


def test_a_damaged_sample_can_be_deleted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for keep_bytes in (0, 100, -1):
        ref = store.put("p.e0", make_sample())
        (path,) = files(tmp_path)
        path.write_bytes(path.read_bytes()[:keep_bytes])
        store.delete(ref)
        assert files(tmp_path) == []


def test_features_are_read_from_a_mount_that_cannot_be_written(tmp_path: Path) -> None:
    ref = open_store(tmp_path).put("p.e0", make_sample())
    with read_only(tmp_path):
        store = open_store(tmp_path)
        assert_same(store.get(ref), make_sample())
        assert store.usage().samples == 1
        with pytest.raises(StoreError, match="Read-only"):
            store.put("q.e0", make_sample())


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    command = ["mount", "--bind", str(directory), str(directory)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(command, check=False).returncode:
        pytest.skip("a directory can be mounted only by root")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.fixture
def small_file_limit() -> Iterator[int]:
    """No file of this process may grow beyond so many bytes: a write fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_fails_in_its_middle_leaves_nothing(tmp_path: Path, small_file_limit: int) -> None:
    store = open_store(tmp_path)
    kept = store.put("p.e0", make_sample(0))
    before = (files(tmp_path), store.usage())
    for sample_id in ("q.e0", "p.e0"):
        with pytest.raises(StoreFull, match="nothing partial"):
            store.put(sample_id, make_sample(1, num_tokens=small_file_limit // 10))
    assert (files(tmp_path), store.usage()) == before
    assert_same(store.get(kept), make_sample(0))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("a small file system can be mounted only by root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_store_full(tiny_disk: Path) -> None:
    store = open_store(tiny_disk)
    kept = fill_up(store)
    assert kept
    for ref, sample in kept:
        assert_same(store.get(ref), sample)
    assert len(list((tiny_disk / ".aside").iterdir())) == 0
    store.delete(kept[0][0])
    store.delete(kept[1][0])
    store.put("again.e0", make_sample(num_tokens=50))


def test_a_directory_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        open_store(tmp_path / "file").put("p.e0", make_sample())


PUT_FOREVER = """
import sys
from pathlib import Path
import torch
from specforge_core.contracts import PartContext, Sample
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileStoreConfig
directory = Path(sys.argv[1])
store = FileStore(FileStoreConfig(name="file", path=directory), PartContext(run_id="run", directory=directory))
number = 0
while True:
    number += 1
    features = {"input_ids": torch.full((200_000,), number), "aux_hidden_states": torch.full((200_000,), float(number))}
    store.put("p.e0", Sample("p", 0, features))
    print(number, flush=True)
"""


def test_a_process_killed_in_mid_put_leaves_the_last_whole_sample(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PUT_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    time.sleep(0.003)
    process.kill()
    process.wait(30)
    process.stdout.close()
    store = open_store(tmp_path)
    assert store.usage().samples == 1
    assert list((tmp_path / ".aside").iterdir()) == []
    again = store.put("q.e0", make_sample())
    assert_same(store.get(again), make_sample())
    (path,) = tmp_path.rglob("p.e0.safetensors")
    with safe_open(path, framework="pt") as file:
        values = file.get_tensor("input_ids")
        assert int(values.min()) == int(values.max()) >= 10


PUT_ONE_ID = """
import sys
from pathlib import Path
from specforge_core.contracts import PartContext
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import make_sample
directory = Path(sys.argv[1])
store = FileStore(FileStoreConfig(name="file", path=directory), PartContext(run_id="run", directory=directory))
for number in range(40):
    ref = store.put("p.e0", make_sample(number))
    print(ref.generation, flush=True)
    if number % 3 == 0:
        store.delete(ref)
"""


def test_generations_are_unique_between_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT_ONE_ID, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    generations = [int(line) for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert len(set(generations)) == 80
    for own in (generations[:40], generations[40:]):
        assert own == sorted(own)


def test_no_file_descriptor_is_left_open(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("p.e0", make_sample())
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store.get(ref)
        store.put(f"q{number}.e0", make_sample(number))
        with pytest.raises(FeatureGone):
            store.get(dataclasses.replace(ref, sample_id="none"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sample_without_token_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="input_ids"):
        open_store(tmp_path).put("p.e0", Sample("p", 0, {"aux_hidden_states": torch.ones(1)}))


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    features = {"input_ids": torch.arange(2), "aux_hidden_states": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(StoreError, match="complex64"):
        open_store(tmp_path).put("p.e0", Sample("p", 0, features))
    assert files(tmp_path) == []
