# SPDX-License-Identifier: Apache-2.0
"""The suites that `plugins check` makes from descriptors: they test the part as a run would construct it."""

from __future__ import annotations

import dataclasses

import pytest
from specforge_core.contracts import StoreCapabilities
from specforge_core.hooks import builtin
from specforge_core.hooks.descriptors import FeatureStoreSpec
from specforge_core.testing.conformance import run_suite
from specforge_core.testing.installed_part import suite_of
from specforge_core.testing.tiny_plugin import specforge_target_engines

STORES = {spec.name: spec for spec in builtin.specforge_feature_stores()}
CHANNELS = {spec.name: spec for spec in builtin.specforge_ref_channels()}
[TINY] = specforge_target_engines()


@pytest.mark.parametrize(
    "spec", [STORES["memory"], CHANNELS["memory"], dataclasses.replace(TINY, example={"seed": 3})], ids=lambda s: s.name
)
def test_the_quick_part_passes_and_leaves_out_what_is_thorough(spec) -> None:
    suite = suite_of(spec)
    assert suite is not None
    report = run_suite(suite, quick=True)
    assert report.ok, {**report.failed, **report.errors}
    assert len(report.passed) > 10
    assert not report.passed & suite.thorough


def test_what_a_descriptor_declares_decides_what_is_tested() -> None:
    test = "test_a_sealed_channel_is_read_in_full_until_it_is_acked"
    for channel, ended in (("memory", "skipped"), ("file", "passed")):
        suite = suite_of(CHANNELS[channel])
        assert suite is not None
        assert getattr(run_suite(suite, only=test), ended) == {test}


def test_without_an_example_there_is_no_suite() -> None:
    assert suite_of(TINY) is None


def test_an_example_that_is_refused_is_an_error_and_not_a_pass() -> None:
    spec = FeatureStoreSpec(
        name="memory",
        config=builtin.MemoryStoreConfig,
        factory="specforge_core.features.memory_store:MemoryStore",
        capabilities=StoreCapabilities(),
        example={"capacity_byte": 7},
    )
    suite = suite_of(spec)
    assert suite is not None
    report = run_suite(suite, only="test_get_returns_what_was_put")
    assert "capacity_byte" in report.errors["test_get_returns_what_was_put"]
