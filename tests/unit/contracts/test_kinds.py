# SPDX-License-Identifier: Apache-2.0
"""Kinds of fields: what each accepts, and that a message about a value is short whatever the value is."""

from __future__ import annotations

import pytest
from specforge_core.contracts.kinds import (
    FLAG,
    OBJECT,
    TEXT,
    find_wrong,
    list_of,
    number,
    object_of,
    or_null,
    shorten,
    whole_number,
)

VALUES = [None, True, False, 0, 1, -1, 7, 10**400, 0.5, 1.0, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        (FLAG, [True, False]),
        (TEXT, ["", "x"]),
        (OBJECT, [{}, {"a": 1}]),
        (whole_number(0, 7), [0, 1, 7]),
        (number(0, 1), [0, 1, 0.5, 1.0]),
        (or_null(whole_number(7, 7)), [None, 7]),
        (list_of(whole_number(1, 1), most=1), [[], [1]]),
        (list_of(whole_number(1, 1), least=1, most=1), [[1]]),
        (object_of({"a": whole_number(1, 1)}), [{"a": 1}]),
    ],
)
def test_a_kind_accepts_what_it_says_and_nothing_else(kind, accepted):
    # Compared by identity and type: True is no 1, and 1.0 no whole number.
    found = [(type(value), repr(value)) for value in VALUES if kind.accepts(value)]
    assert found == [(type(value), repr(value)) for value in VALUES if repr(value) in [repr(a) for a in accepted]]
    assert kind.words


def test_the_first_wrong_field_is_named_and_a_missing_one_is_not():
    kinds = {"a": FLAG, "b": TEXT, "c": OBJECT}
    assert find_wrong({"a": True, "c": {}}, kinds) is None
    assert find_wrong({"a": True, "b": 7, "c": 7}, kinds) == ("b", "7 is not a text")


def test_a_shortened_value_is_short():
    deep: list[object] = []
    for _ in range(900):
        deep = [deep]
    for value in ("x" * 10**7, [1] * 10**6, {str(n): n for n in range(10**5)}, 10**400, deep):
        assert len(shorten(value)) < 2000
