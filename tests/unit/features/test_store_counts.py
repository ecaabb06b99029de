# SPDX-License-Identifier: Apache-2.0
"""What the processes of one file store share: counts and capacity, generations, what lies aside; and its checksum."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from specforge_core.contracts import AccessDenied, FeatureCorrupt, PartContext, Sample, StoreFull
from specforge_core.features.file_lock import lock_file
from specforge_core.features.file_store import FileStore
from specforge_core.features.store_counts import StoreCounts
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import assert_same, fill_up, make_sample

torch.set_num_threads(1)
PAGE = 4096


def open_store(directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> FileStore:
    config = FileStoreConfig(name="file", path=directory, capacity_bytes=capacity_bytes)
    return FileStore(config, PartContext(run_id="run", directory=directory, token=token))


def samples_on_disk(directory: Path) -> list[int]:
    return [path.stat().st_size for path in directory.rglob("*.safetensors")]


def assert_counted(directory: Path, store: FileStore) -> None:
    sizes = samples_on_disk(directory)
    assert (store.usage().samples, store.usage().nbytes) == (len(sizes), sum(sizes))


def test_every_process_sees_what_all_of_them_hold(tmp_path: Path) -> None:
    first, second = open_store(tmp_path / "s"), open_store(tmp_path / "s")
    refs = [store.put(f"p{n}.e0", make_sample(n)) for n, store in enumerate([first, second, first])]
    assert first.usage() == second.usage()
    assert_counted(tmp_path, first)
    second.put("p0.e0", make_sample(9, num_tokens=40))
    first.delete(refs[1])
    assert_counted(tmp_path, second)
    assert first.usage().samples == 2


def test_capacity_is_one_for_all_processes(tmp_path: Path) -> None:
    stores = [open_store(tmp_path, capacity_bytes=30_000) for _ in range(3)]
    fits = len(fill_up(open_store(tmp_path / "alone", capacity_bytes=30_000)))

    def put(number: int) -> bool:
        try:
            stores[number % 3].put(f"p{number}.e0", make_sample(number, num_tokens=50))
        except StoreFull:
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        kept = sum(pool.map(put, range(2 * fits)))
    held = [path.stat().st_size for path in tmp_path.glob("??/*.safetensors")]
    assert len(held) == kept == fits
    assert sum(held) <= 30_000


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    store = open_store(tmp_path, capacity_bytes=100_000)
    (tmp_path / ".aside").mkdir()
    with (tmp_path / ".aside" / "somebody.1").open("xb") as living:
        assert lock_file(living, seconds=1)
        living.truncate(99_000)
        living.flush()
        open_store(tmp_path)
        with pytest.raises(StoreFull, match="99000 of 100000"):
            store.put("p.e0", make_sample(num_tokens=50))
    os.utime(tmp_path / ".aside" / "somebody.1", (0, 0))
    store.put("p.e0", make_sample(num_tokens=50))
    assert_counted(tmp_path, store)


def test_a_count_that_is_too_high_is_found_before_a_put_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path, capacity_bytes=8_000)
    assert fill_up(store)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    store.put("q.e0", make_sample(num_tokens=50))
    assert_counted(tmp_path, store)


def test_what_a_dead_process_left_aside_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    open_store(tmp_path).put("p.e0", make_sample())
    machine = os.uname().nodename
    left, living, elsewhere = (tmp_path / ".aside" / f"{name}" for name in (f"{machine}.1", f"{machine}.2", "other.1"))
    left.write_bytes(b"torn")
    elsewhere.write_bytes(b"torn")
    with living.open("xb") as file:
        assert lock_file(file, seconds=1)
        open_store(tmp_path)
        assert (left.exists(), living.exists(), elsewhere.exists()) == (False, True, True)
    hours_ago = time.time() - 7200
    os.utime(elsewhere, (hours_ago, hours_ago))
    store = open_store(tmp_path)
    assert list((tmp_path / ".aside").iterdir()) == []
    assert_counted(tmp_path, store)


def test_generations_go_on_where_a_power_cut_took_the_record_back(tmp_path: Path) -> None:
    record = tmp_path / "s" / ".counts"
    store = open_store(tmp_path / "s")
    store.put("p.e0", make_sample())
    on_disk = record.read_bytes()  # what was synced when the block was begun
    newest = [store.put("p.e0", make_sample(n)) for n in range(5)][-1]
    store.delete(newest)
    record.write_bytes(on_disk)
    again = open_store(tmp_path / "s")
    assert again.usage().samples == 0
    assert again.put("p.e0", make_sample()).generation > newest.generation


def test_generations_pass_the_end_of_a_block(tmp_path: Path) -> None:
    counts = StoreCounts(tmp_path)
    with counts.locked() as held:
        first = held.next_generation(above=0)
        held.generation = held.reserved - 1
        drawn = [held.next_generation(above=0) for _ in range(3)]
        assert drawn == [drawn[0], drawn[0] + 1, drawn[0] + 2]
        assert held.reserved > drawn[-1] > first
        assert held.next_generation(above=10**9) == 10**9 + 1


def test_two_puts_of_one_id_at_once_leave_the_newer(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    big = {"input_ids": torch.arange(200_000)}
    with ThreadPoolExecutor(4) as pool:
        refs = list(pool.map(lambda n: store.put("p.e0", Sample(f"p{n}", 0, big)), range(20)))
    newest = max(refs, key=lambda ref: ref.generation)
    assert store.get(newest).prompt_id == newest.prompt_id
    assert_counted(tmp_path, store)


def test_claims_at_once_agree_on_one_token(tmp_path: Path) -> None:
    started = threading.Barrier(4)

    def claim(token: str) -> bool:
        started.wait(20)
        try:
            open_store(tmp_path / "s", token=token)
        except AccessDenied:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        let_in = list(pool.map(claim, ["a", "b", "a", "b"]))
    assert let_in in ([True, False, True, False], [False, True, False, True])
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".access", ".counts"]


def test_features_put_without_a_token_are_not_claimed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    ref = store.put("p.e0", make_sample())
    with pytest.raises(AccessDenied, match="without a token"):
        open_store(tmp_path, token="secret")
    store.delete(ref)
    open_store(tmp_path, token="secret")
    with pytest.raises(AccessDenied, match="none was given"):
        open_store(tmp_path)


def test_the_token_is_not_in_the_directory_and_the_proof_is_of_no_use_elsewhere(tmp_path: Path) -> None:
    for name in ("a", "b"):
        open_store(tmp_path / name, token="secret-words")
    kept = [(tmp_path / name / ".access").read_text() for name in ("a", "b")]
    assert kept[0] != kept[1]
    assert "secret" not in "".join(kept)
    (tmp_path / "b" / ".access").write_text("")
    with pytest.raises(AccessDenied):
        open_store(tmp_path / "b", token="secret-words")


def test_altered_bytes_of_a_big_sample_are_noticed(tmp_path: Path) -> None:
    sample = Sample("p", 0, {"input_ids": torch.arange(8), "aux_hidden_states": torch.randn(1_500_000, 1, 1)})
    store = open_store(tmp_path)
    ref = store.put("p.e0", sample)
    assert_same(store.get(ref), sample)
    [path] = tmp_path.rglob("*.safetensors")
    whole = path.read_bytes()
    pages = [whole[begin : begin + PAGE] for begin in (PAGE, 200 * PAGE)]
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    for damaged in (
        bytes(flipped),
        whole[:PAGE] + pages[1] + whole[2 * PAGE : 200 * PAGE] + pages[0] + whole[201 * PAGE :],
        whole[: 200 * PAGE] + bytes(PAGE) + whole[201 * PAGE :],
        whole[: 200 * PAGE] + pages[0] + whole[201 * PAGE :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(FeatureCorrupt, match="not the ones that were written"):
            store.get(ref)


def test_what_get_gave_is_the_callers_own(tmp_path: Path) -> None:
    sample = Sample("p", 0, {"input_ids": torch.arange(8), "aux_hidden_states": torch.randn(1_500_000, 1, 1)})
    store = open_store(tmp_path)
    ref = store.put("p.e0", sample)
    store.get(ref).features["aux_hidden_states"].mul_(2)
    assert_same(store.get(ref), sample)


SYNC = """
import sys
from pathlib import Path
from specforge_core.contracts import PartContext
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import make_sample
synced = []
sys.addaudithook(lambda event, args: synced.append(str(args[0])) if event == "open" else None)
directory = Path(sys.argv[1])
store = FileStore(FileStoreConfig(name="file", path=directory), PartContext(run_id="run", directory=directory))
ref = store.put("p.e0", make_sample())
gone = store.put("q.e0", make_sample())
store.delete(gone)
synced.clear()
store.sync()
print([Path(name).name for name in synced])
synced.clear()
store.sync()
store.close()
print(synced)
"""


def test_sync_is_of_what_was_put_since_and_is_still_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SYNC, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert "p.e0.safetensors" in lines[0]
    assert lines[1] == "[]"
