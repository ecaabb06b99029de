# SPDX-License-Identifier: Apache-2.0
"""The feature store contract on a real Mooncake master, and the service's traps that the store must not fall into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mooncake_service import MooncakeService, bare_client, fresh_run, mooncake_service, require_mooncake
from pydantic import ValidationError
from specforge_core.contracts import (
    AccessDenied,
    FeatureCorrupt,
    FeatureGone,
    FeatureSpec,
    Sample,
    SampleRef,
    StaleRef,
    StoreError,
    StoreFull,
)
from specforge_core.testing.feature_store_suite import FeatureStoreSuite
from specforge_core.testing.samples import assert_same, make_sample
from specforge_mooncake_store.connection import Connection
from specforge_mooncake_store.generations import Generations
from specforge_mooncake_store.layout import MAX_GENERATION
from specforge_mooncake_store.registration import Registrations, merge

require_mooncake()
torch.set_num_threads(1)

SERVICE: MooncakeService


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[MooncakeService]:
    global SERVICE
    # Closing a client takes seconds in which no Python runs; stores of one section share it while this one is open.
    with mooncake_service() as SERVICE, closing(SERVICE.store("kept open")):
        yield SERVICE


def large(mib: int, number: int = 0) -> Sample:
    values = torch.full((mib << 20,), number, dtype=torch.uint8)
    return Sample(f"large-{number}", 0, {"input_ids": torch.arange(4), "aux_hidden_states": values})


def tensor_key(ref: SampleRef, feature: str = "aux_hidden_states") -> str:
    [key] = [key for key in SERVICE.keys(f"/{ref.generation}.") if key.endswith(feature)]
    return key


class TestMooncakeStore(FeatureStoreSuite):
    limits_capacity = False
    _runs: ClassVar[dict[Path, str]] = {}

    def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> Any:
        return SERVICE.store(self._runs.setdefault(directory, fresh_run()), token=token)

    def corrupt(self, directory: Path, ref: SampleRef, keep_bytes: int) -> None:
        """Cut the largest tensor; an object has at least one byte, so 0 leaves one."""
        key = tensor_key(ref)
        nbytes = max(spec.nbytes for spec in ref.features)
        kept = min(max(keep_bytes, 1), nbytes - 1) if keep_bytes >= 0 else nbytes + keep_bytes
        replace_object(key, kept)

    def substitute(self, directory: Path, ref: SampleRef, other: Sample) -> None:
        """Whoever reaches the master can replace an object, and who reaches a segment its bytes."""
        content = other.features["aux_hidden_states"]
        replace_object(tensor_key(ref), content.nbytes, content)


def replace_object(key: str, nbytes: int, content: torch.Tensor | None = None) -> None:
    with closing(Connection(SERVICE.section())) as connection:
        connection.remove([key])
        connection.put([key], [torch.zeros(nbytes, dtype=torch.uint8) if content is None else content])


@pytest.fixture
def run() -> str:
    return fresh_run()


@pytest.fixture
def store(run: str) -> Iterator[Any]:
    store = SERVICE.store(run)
    yield store
    store.close()


def sample_keys(run: str) -> list[str]:
    return [key for key in SERVICE.keys(f"specforge/{run}/") if not key.endswith("/access")]


def test_replaced_objects_go_whoever_put_them(run: str, store: Any) -> None:
    with closing(SERVICE.store(run)) as other:
        for number, putting in enumerate((store, other, store)):
            ref = putting.put("p.e0", make_sample(number, num_tokens=3 + number))
    assert_same(store.get(ref), make_sample(2, num_tokens=5))
    assert len(sample_keys(run)) == len(ref.features) + 1  # and the index
    store.delete(ref)
    assert sample_keys(run) == []


def test_empty_tensors_are_no_objects(run: str, store: Any) -> None:
    sample = Sample("p", 0, {"input_ids": torch.arange(3), "aux_hidden_states": torch.empty(0, 2, 3)})
    only_empty = Sample("q", 0, {"input_ids": torch.arange(0)})
    refs = [store.put(sample.sample_id, sample), store.put(only_empty.sample_id, only_empty)]
    assert sorted(key.rpartition("/")[2] for key in sample_keys(run)) == ["input_ids", "p.e0", "q.e0"]
    assert_same(store.get(refs[0]), sample)
    assert_same(store.get(refs[1]), only_empty)
    for ref in refs:
        store.delete(ref)
        with pytest.raises(FeatureGone):
            store.get(ref)


def test_a_full_store_evicts_nothing_and_keeps_nothing_partial(run: str, store: Any) -> None:
    """The service evicts unpinned objects silently, from 90 % on."""
    kept = [store.put(f"p{number}.e0", large(7, number)) for number in range(9)]  # 63 of 64 MiB
    with pytest.raises(StoreFull, match="do not fit"):
        store.put("q.e0", large(7))
    assert len(sample_keys(run)) == 3 * len(kept)
    replaced = kept[0]
    with pytest.raises(StoreFull):
        store.put("p0.e0", large(9))
    for number, ref in enumerate(kept):
        assert_same(store.get(ref), large(7, number))
    for ref in kept[1:]:
        store.delete(ref)  # just read, so the service leases them
    assert len(sample_keys(run)) == 3
    assert_same(store.get(store.put("again.e0", large(40))), large(40))
    assert_same(store.get(replaced), large(7, 0))
    for name in ("again.e0", "p0.e0"):
        store.delete(store.put(name, make_sample()))


def test_a_tensor_larger_than_a_segment_says_so(store: Any) -> None:
    with pytest.raises(StoreFull, match=rf"one segment, and the largest here has {65 << 20} bytes"):
        store.put("p.e0", large(65))
    assert store.usage().samples == 0


def test_an_object_longer_than_its_ref_is_corrupt(store: Any) -> None:
    ref = store.put("p.e0", make_sample())
    replace_object(tensor_key(ref), 10_000)
    with pytest.raises(FeatureCorrupt, match="more of aux_hidden_states"):
        store.get(ref)


def test_part_of_a_sample_is_gone_and_leaves_nothing_behind(run: str, store: Any) -> None:
    """Tensors of one sample may lie in several segments, and one of them may go."""
    ref = store.put("p.e0", make_sample())
    with closing(Connection(SERVICE.section())) as connection:
        connection.remove([tensor_key(ref, "loss_mask")])
    with pytest.raises(FeatureGone):
        store.get(ref)
    assert sample_keys(run) == []


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
def test_a_sample_removed_while_it_is_read_is_never_returned(run: str, store: Any, again: bool) -> None:
    """Its memory may hold another sample's bytes by then."""
    ref = store.put("p.e0", make_sample())
    read = store._connection.get_into

    def read_slowly(keys: list[str], tensors: list[torch.Tensor]) -> list[int]:
        counts = read(keys, tensors)
        store._connection.get_into = read
        with closing(SERVICE.store(run)) as other:
            other.put("p.e0", make_sample(1)) if again else other.delete(ref)
        return counts

    store._connection.get_into = read_slowly
    with pytest.raises(StaleRef if again else FeatureGone):
        store.get(ref)


def test_runs_are_kept_apart(store: Any) -> None:
    ids = ["a", "a/b", "a%2Fb", "..", "é", "\ud800", "x" * 500, "x" * 501]
    runs = [SERVICE.store(f"{fresh_run()}{name}") for name in ids]
    refs = [run.put("p.e0", make_sample(number)) for number, run in enumerate(runs)]
    for number, (run, ref) in enumerate(zip(runs, refs, strict=True)):
        assert_same(run.get(ref), make_sample(number))
        with pytest.raises(FeatureGone):
            store.get(ref)
        run.close()


def test_a_token_given_by_mistake_does_not_claim_a_run_that_has_none(run: str) -> None:
    with closing(SERVICE.store(run)) as store:
        with pytest.raises(PermissionError, match="begun without a token"):
            SERVICE.store(run, token="a secret")
        ref = store.put("p.e0", make_sample())
        with closing(SERVICE.store(run)) as again:
            assert_same(again.get(ref), make_sample())


def test_with_a_token_names_cannot_be_derived_from_the_run(run: str) -> None:
    with closing(SERVICE.store(run, token="secret")) as store:
        ref = store.put("p.e0", make_sample())
        assert SERVICE.keys(f"specforge/{run}/") == [f"specforge/{run}/access"]
        assert "secret" not in "".join(SERVICE.keys())
        store.delete(ref)
        with closing(SERVICE.store(run, token="secret")) as again:
            assert_same(again.get(again.put("p.e0", make_sample())), make_sample())


def test_usage_follows_what_others_delete(run: str, store: Any) -> None:
    refs = [store.put(f"p{number}.e0", make_sample(number)) for number in range(3)]
    with closing(SERVICE.store(run)) as other:
        assert other.usage().samples == 0
        other.delete(refs[0])
        other.put("p1.e0", make_sample(5))
        assert other.usage().samples == 1
    assert store.usage().samples == 1


def test_a_client_without_memory_uses_what_others_bring(run: str, store: Any) -> None:
    with closing(SERVICE.store(run, segment_bytes=0)) as pure:
        ref = pure.put("p.e0", make_sample())
        assert_same(store.get(ref), make_sample())
    assert_same(store.get(ref), make_sample())


def test_memory_is_registered_once_however_often_it_is_transferred(store: Any) -> None:
    """What RDMA needs; TCP accepts it. The library refuses ranges that overlap."""
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    ranges = [(part.data_ptr(), part.nbytes) for part in (memory[:4096], memory[2048:8192], memory[20_000:30_000])]
    with bare_client(SERVICE) as client:
        registrations = Registrations(client)
        with registrations.hold(ranges):
            with registrations.hold(ranges[2:]):
                assert client.register_buffer(*ranges[0]) != 0
            assert client.register_buffer(*ranges[2]) != 0, "still held"
            with pytest.raises(StoreError, match="cannot be registered"), registrations.hold(ranges[:1]):
                pass
        for held in ranges[::2]:
            assert client.register_buffer(*held) == 0
            assert client.unregister_buffer(held[0]) == 0


@pytest.mark.parametrize(
    ("ranges", "merged"),
    [
        ([], []),
        ([(10, 5), (0, 5)], [(0, 5), (10, 5)]),
        ([(0, 5), (0, 5)], [(0, 5)]),
        ([(0, 10), (2, 3), (9, 4)], [(0, 13)]),
        ([(0, 5), (5, 5)], [(0, 5), (5, 5)]),
    ],
)
def test_overlapping_memory_is_one_range(ranges: list[tuple[int, int]], merged: list[tuple[int, int]]) -> None:
    assert merge(ranges) == merged


def test_generations_grow_whatever_the_clock_does() -> None:
    moments = iter([2e9, 2e9, 1e9, 0.0, 2e9 + 1])
    drawing = Generations(lambda: next(moments))
    drawn = [drawing.draw() for _ in range(4)]
    assert drawn == sorted(set(drawn))
    assert drawing.draw(above=drawn[-1] + (1 << 40)) > drawn[-1] + (1 << 40)


@pytest.mark.parametrize("planted", [-1, 2**61, 2**61 + 1, 2**62, 2**63 - 1, 2**63, 10**30])
def test_no_generation_that_somebody_made_up_pushes_others_out_of_64_bits(planted: int) -> None:
    drawing = Generations(lambda: 1.8e9)
    drawing.saw(planted)
    drawn = [drawing.draw(above=planted) for _ in range(1000)]
    assert drawn == sorted(set(drawn))
    assert 0 < drawn[0] < drawn[-1] < MAX_GENERATION


GARBAGE = [
    b"x",
    b"[" * 4000,
    b'{"a": 1, "b": 2}',
    b'"ab"',
    b"null",
    b"7",
    b"[1]",
    b"\xff\xfe",
    b"\0" * 4097,
    *(b'[%s, "digest", "input_ids"]' % number for number in (b"-1", b"0", b"1.5", b"1e30", b"true", b'"1"', b"null")),
    *(b'[%d, "digest", "input_ids"]' % number for number in (2**61, 2**62, 2**63 - 1, 10**30)),
    b'[5, ["digest"], "input_ids"]',
    b'[5, "../../digest", "../other"]',
    b'[5, "digest", 7, null, {}]',
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_an_index_that_somebody_else_wrote_is_replaced(run: str, store: Any, content: bytes) -> None:
    ref = store.put("p.e0", make_sample(1))
    [index] = [key for key in sample_keys(run) if "/i/" in key]
    with closing(Connection(SERVICE.section())) as connection:
        connection.remove([index])
        connection.put([index], [torch.frombuffer(bytearray(content), dtype=torch.uint8)])
    with suppress(StoreError):
        assert_same(store.get(ref), make_sample(1))
    again = store.put("p.e0", make_sample(2))
    assert 0 < again.generation < MAX_GENERATION
    assert_same(store.get(again), make_sample(2))
    store.delete(again)
    assert index not in sample_keys(run)


@pytest.mark.parametrize("content", [b"x", b"\0" * 5000, b"[" * 4000, b"\xff" * 4096])
@pytest.mark.parametrize("token", [None, "sixteen characters or more"])
def test_a_proof_that_somebody_else_wrote_lets_nobody_in(
    run: str, store: Any, content: bytes, token: str | None
) -> None:
    store.put("p.e0", make_sample(1))
    key = f"specforge/{run}/access"
    with closing(Connection(SERVICE.section())) as connection:
        connection.remove([key])
        connection.put([key], [torch.frombuffer(bytearray(content), dtype=torch.uint8)])
    with pytest.raises(AccessDenied, match=run):
        SERVICE.store(run, token=token)


@pytest.mark.parametrize("shape", [(1 << 62,), (1 << 40, 1 << 40), (1 << 45,), (1 << 50, 0)])
def test_a_ref_that_claims_much_memory_takes_none(store: Any, shape: tuple[int, ...]) -> None:
    ref = store.put("p.e0", make_sample(1))
    spec = FeatureSpec("aux_hidden_states", shape, "float32")
    hostile = dataclasses.replace(ref, features=(*ref.features[1:], spec))
    with pytest.raises(StoreError):
        store.get(hostile)


def test_two_processes_never_draw_the_same_generation() -> None:
    drawing = [Generations(lambda: 1.8e9) for _ in range(2)]  # the same millisecond, over and over
    assert len({one.draw() for one in drawing for _ in range(20)}) == 40
    assert max(one.draw() for one in drawing) < 2**53


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"segment_bytes": 1 << 20}, "at least 16777216"),
        ({"master": "localhost"}, "master"),
        ({"deadline_seconds": 0}, "greater than 0"),
        ({"protocol": "carrier pigeon"}, "tcp"),
    ],
)
def test_sections_that_cannot_work_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        SERVICE.section(**settings)
