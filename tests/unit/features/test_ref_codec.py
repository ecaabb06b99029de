# SPDX-License-Identifier: Apache-2.0
"""Refs as compact records: every ref comes back the same, and nothing that is not exactly a record is read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from specforge_core import RefDecoder, RefEncoder
from specforge_core.contracts import FeatureSpec, SampleRef, held_out_sample_id, skipped_ref
from specforge_core.testing.samples import make_ref

PLAIN = make_ref(0)
SIGNED = replace(make_ref(1), signature="c2lnbmVk")
VOUCHED = replace(make_ref(8), signature="c2lnbmVk", digest="0123abcd")
OTHERS = [
    replace(make_ref(2), sample_id=held_out_sample_id("prompt-2")),
    replace(make_ref(3), sample_id="", prompt_id="", signature=""),
    replace(make_ref(4, epoch=7, generation=3), store="elsewhere"),
    replace(make_ref(5), prompt_id="ünïcode \ud800\n"),
    replace(make_ref(6), features=(FeatureSpec("x", (), "int64"), FeatureSpec("y", (9, 0), "uint8"))),
    skipped_ref("prompt-9.e1", prompt_id="prompt-9", epoch=1),
]


def as_read(value: object) -> Any:
    return json.loads(json.dumps(value))


def decoder_of(layouts: list[Any]) -> RefDecoder:
    decoder = RefDecoder()
    for layout in layouts:
        decoder.add_layout(as_read(layout))
    return decoder


@pytest.mark.parametrize(
    "refs",
    [
        [PLAIN],
        [SIGNED],
        [make_ref(number) for number in range(20)],
        [replace(make_ref(number), signature=f"s{number}") for number in range(20)],
        [VOUCHED],
        [PLAIN, SIGNED, VOUCHED, *OTHERS],
        [*OTHERS, PLAIN, PLAIN],
        *([ref] for ref in OTHERS),
    ],
)
def test_refs_come_back_the_same_from_a_batch_and_one_by_one(refs: list[SampleRef]) -> None:
    layouts, record = RefEncoder().encode_batch(refs)
    found = decoder_of(layouts).decode_batch(as_read(record))
    assert found == refs
    assert [hash(ref) for ref in found] == [hash(ref) for ref in refs]
    encoder = RefEncoder()
    encoded = [encoder.encode(ref) for ref in refs]
    decoder = decoder_of([layout for layout, _ in encoded if layout is not None])
    assert [decoder.decode(as_read(record)) for _, record in encoded] == refs


def test_what_is_the_same_for_a_whole_batch_is_recorded_once() -> None:
    layouts, record = RefEncoder().encode_batch([make_ref(0), make_ref(1)])
    assert len(layouts) == 1
    assert record == [0, ("prompt-0", "prompt-1"), 0, 1, (3, 4)]
    assert RefEncoder().encode(SIGNED)[1] == [0, "prompt-1", 0, 1, 4, None, "c2lnbmVk"]
    assert RefEncoder().encode(VOUCHED)[1] == [0, "prompt-8", 0, 1, 4, None, "c2lnbmVk", "0123abcd"]


def test_a_decoded_ref_says_where_it_was_read() -> None:
    layouts, record = RefEncoder().encode_batch([PLAIN, VOUCHED])
    found = decoder_of(layouts).decode_batch(as_read(record), origin="here")
    assert [ref.origin for ref in found] == ["here", "here"]
    assert found == [PLAIN, VOUCHED]


def test_layouts_are_recorded_once_and_a_copy_can_be_thrown_away() -> None:
    encoder = RefEncoder()
    thrown_away = encoder.copy()
    assert len(thrown_away.encode_batch([PLAIN, OTHERS[2]])[0]) == 2
    [layout], record = encoder.encode_batch([OTHERS[2]])
    assert (layout[0], record[0]) == ("elsewhere", 0)
    kept = encoder.copy()
    assert kept.encode_batch([PLAIN, OTHERS[2]])[1][0] == [1, 0]
    assert RefEncoder([layout]).encode_batch([OTHERS[2]])[0] == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epoch": object()}, TypeError),
        ({"features": (object(),)}, TypeError),
        ({"features": (FeatureSpec("x", (3, True), "int64"),)}, TypeError),
        ({"epoch": True}, ValueError),
        ({"generation": 1.0}, ValueError),
        ({"signature": None}, ValueError),
        ({"num_tokens": -1}, ValueError),
        ({"features": (FeatureSpec("x", (3, 3), "complex64"),)}, ValueError),
        ({"features": (FeatureSpec("x", (3, -1), "int64"),)}, ValueError),
    ],
)
def test_what_no_decoder_would_take_is_not_encoded(change: dict[str, Any], error: type[Exception]) -> None:
    encoder = RefEncoder()
    encoder.encode_batch([PLAIN])
    with pytest.raises(error):
        encoder.encode_batch([PLAIN, replace(PLAIN, **change)])
    with pytest.raises(error):
        encoder.encode(replace(PLAIN, **change))


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        [],
        [0, ["p"], 0, 1],
        [0, ["p"], 0, 1, 3, None, "", "", ""],
        [0, ["p"], 0, 1, 3, None, "", None],
        [0, ["p"], 0, 2**63, 3],
        [0, ["p"], 10**30, 1, 3],
        [0, ["p"], 0, 1, 10**30],
        [0, [], 0, 1, 3],
        [0, "p", 0, 1, 3],
        [0, ["p", 5], 0, 1, 3],
        [1, ["p"], 0, 1, 3],
        [[0, 1], ["p", "q"], 0, 1, 3],
        [-1, ["p"], 0, 1, 3],
        [0, ["p", "q"], [0, -1], 1, 3],
        [0, ["p", "q"], 0, [1], 3],
        [0, ["p", "q"], 0, 1, [3, 4, 5]],
        [0, ["p", "q"], 0, 1, [3, True]],
        [0, ["p", "q"], 0, 1, [3, None]],
        [0, ["p"], 0.0, 1, 3],
        [0, ["p"], 0, 1, 3, 5],
        [0, ["p", "q"], 0, 1, 3, [None, 5]],
        [0, ["p"], 0, 1, 3, None, None],
        [0, ["p", "q"], 0, 1, 3, None, ["s"]],
        [0, ["p"], 0, 1, 3, None, {"s": 1}],
        [0, ["p"], 2**63, 1, 3],
        [0, ["p"], 0, 10**4000, 3],
        [0, ["p", "q"], 0, 1, [3, 2**63]],
    ],
)
def test_a_malformed_batch_is_refused(record: Any) -> None:
    decoder = decoder_of(RefEncoder().encode_batch([PLAIN])[0])
    with pytest.raises(ValueError, match=r"ref|counts|list|recorded"):
        decoder.decode_batch(record)


@pytest.mark.parametrize(
    "record",
    [
        None,
        7,
        "ab",
        {},
        {"s": 1, "abcd": 2},
        [],
        ["s"],
        ["s", None],
        ["s", "abcd"],
        ["s", {"abcd": 1}],
        ["s", [], []],
        [None, []],
        [["s"], []],
        ["s", [7]],
        ["s", ["abcd"]],
        ["s", [["x", "float32", None]]],
        *(["s", [[name, "float32", None, [1]]]] for name in (None, 7, [], {})),
        *(["s", [["x", dtype, None, [1]]]] for dtype in (None, 7, ["float32"], {}, "complex64")),
        *(["s", [["x", "float32", norm, [1]]]] for norm in (7, [], {}, "mid", False)),
        *(["s", [["x", "float32", None, shape]]] for shape in (None, 7, "3", {"3": 3}, [[3]], [{}], ["3"], [True])),
        *(["s", [["x", "float32", None, shape]]] for shape in ([-1], [1.0], [10**30], [2**63], [None, 2**41], [1] * 9)),
        ["s", [["x", "float32", None, [0, 10**30]]]],
        ["s", [["x", "float32", None, [2**20, 2**20, 2**20]]]],
        ["s", [["x", "float32", None, [1] * 100_000]]],
    ],
    ids=lambda record: repr(record)[:40],
)
def test_a_hostile_layout_is_refused(record: Any) -> None:
    decoder = RefDecoder()
    with pytest.raises(ValueError, match=r".+"):
        decoder.add_layout(as_read(record))
    assert decoder.layouts == []


@pytest.mark.parametrize("record", [None, [], [0], [0, ["p"], 0, 1, 3], [[0], "p", 0, 1, 3], [0, "p", 0, 1]])
def test_a_malformed_record_of_one_ref_is_refused(record: Any) -> None:
    decoder = decoder_of(RefEncoder().encode_batch([PLAIN])[0])
    with pytest.raises(ValueError, match="ref"):
        decoder.decode(record)
