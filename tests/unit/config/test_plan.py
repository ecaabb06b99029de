# SPDX-License-Identifier: Apache-2.0
"""Composing a run: what fits is described, what does not fit is said at once, and nothing imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_distributions import install_strategy, install_target
from specforge_core.config.load import load_run_config
from specforge_core.config.plan import Plan, compose
from specforge_core.config.schema import run_schema
from specforge_core.contracts import PlanError
from specforge_core.hooks.manager import PluginRegistry


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginRegistry:
    install_strategy(tmp_path / "site", "plan-strategy", "fancy")
    install_target(tmp_path / "site", "plan-target", "fake")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    return PluginRegistry.discover()


def plan(registry: PluginRegistry, *overrides: str, **changes: Any) -> Plan:
    values = {
        "run": {"directory": "runs/x"},
        "target": {"name": "fake"},
        "strategy": {"name": "fancy"},
        "data": {"train": ["train.jsonl"], "max_length": 64},
        **changes,
    }
    Path("run.yaml").write_text(yaml.safe_dump(values))
    return compose(load_run_config("run.yaml", overrides), registry)


def mismatches(registry: PluginRegistry, *overrides: str, **changes: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        plan(registry, *overrides, **changes)
    return caught.value.mismatches


def test_bytes_follow_from_the_request(registry: PluginRegistry) -> None:
    composed = plan(registry)
    per_token = 8 + 1 + 8 * 4 + 8 * 4  # input_ids, loss_mask, one layer and the last state in float32, hidden size 8
    assert composed.bytes_per_token == per_token
    assert composed.bytes_per_sample == 64 * per_token
    assert composed.bytes_per_window == 16 * 64 * per_token
    assert composed.feature_reuse
    json.dumps(composed.as_json())


@pytest.mark.parametrize(
    ("topology", "part"), [("offline", "file"), ("colocated", "memory"), ("disaggregated", "file")]
)
def test_topology_chooses_the_wires(registry: PluginRegistry, topology: str, part: str) -> None:
    composed = plan(registry, topology=topology)
    assert (composed.feature_store.name, composed.ref_channel.name) == (part, part)
    assert composed.feature_reuse == (topology == "offline")


@pytest.mark.parametrize(
    "overrides",
    [
        ["topology=colocated", "capture.high_watermark_bytes=186880"],
        ["topology=colocated", "capture.batch_size=32"],
        ["topology=offline", "capture.batch_size=33", "capture.high_watermark_bytes=1000"],
    ],
)
def test_watermarks_that_just_fit(registry: PluginRegistry, overrides: list[str]) -> None:
    plan(registry, *overrides)


@pytest.mark.parametrize(
    ("topology", "retain", "expected"),
    [
        ("offline", "checkpoint", "never"),
        ("colocated", None, "window"),
        ("disaggregated", None, "checkpoint"),
        ("disaggregated", "window", "window"),
    ],
)
def test_when_features_are_freed(registry: PluginRegistry, topology: str, retain: str | None, expected: str) -> None:
    composed = plan(registry, topology=topology, loading={"retain": retain})
    assert composed.retain == expected
    assert {"never": "kept", "window": "with their window", "checkpoint": "once a checkpoint"}[expected] in (
        composed.halves()["train"]
    )


@pytest.mark.parametrize(("run", "expected"), [({}, "x"), ({"id": "night-3"}, "night-3")])
def test_every_process_of_a_run_calls_it_the_same(registry: PluginRegistry, run: dict[str, str], expected: str) -> None:
    assert plan(registry, run={"directory": "runs/x", **run}).run_id == expected


def test_resolved_run_file_gives_the_same_plan_again(registry: PluginRegistry) -> None:
    composed = plan(registry, "training.epochs=3")
    resolved = composed.resolved()
    assert resolved["training"]["learning_rate"] == composed.strategy_section.optimizer_defaults.learning_rate
    Path("again.yaml").write_text(yaml.safe_dump(resolved))
    assert compose(load_run_config("again.yaml"), registry).resolved() == resolved


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["strategy.layers=[0,4]"], ["aux_layer_ids [4] are outside the target's layers 0 to 3"]),
        (["strategy.layers=[1,1]"], ["name a layer twice"]),
        (["strategy.norm=pre"], ["norm 'pre'", "captures post"]),
        (["strategy.dtype=bfloat16"], ["needs features in bfloat16", "gives float32"]),
        (["strategy.dtype=float1"], ["'float1' is not one of"]),
        (["strategy.layerz=[1]"], ["override 'strategy.layerz=[1]'", "did you mean 'layers'"]),
        (["store.name=memory"], ["not cross-process and durable", "store: {name: file}"]),
        (["channel.name=memory"], ["not durable and replayable", "channel: {name: file}"]),
        (["topology=disaggregated", "store.name=memory"], ["not cross-process", "store: {name: file}"]),
        (["topology=disaggregated", "channel.name=memory"], ["not cross-process", "channel: {name: file}"]),
        (["topology=colocated", "capture.high_watermark_bytes=1000"], ["less than two windows", "186880 bytes"]),
        (
            ["topology=colocated", "capture.high_watermark_bytes=186879"],
            ["186879 bytes hold less than", "186880 bytes"],
        ),
        (["topology=colocated", "capture.batch_size=33"], ["4 windows of 16", "32 samples", "capture batch of 33"]),
        (["topology=colocated", "data.features=x"], ["only `topology: offline` keeps features"]),
        (["training.micro_batch_size=17"], ["17 is more than the 16 samples"]),
        (["training.device=tpu"], ["'tpu' is not cpu, cuda or cuda:N"]),
        (["evaluation.every_steps=5"], ["nothing to evaluate on"]),
        (["data.max_length=129"], ["129 is more than the target's 128 positions"]),
        (["data.train=[none.jsonl]"], ["none.jsonl does not exist"]),
        (["run.directory=train.jsonl"], ["is a file; name a directory"]),
        (["strategy.name=fanci"], ["no strategy 'fanci' is installed", "did you mean 'fancy'"]),
        (["target.name=far"], ["`specforge plugins` lists"]),
        (["target.name=null"], ["is missing (one of: fake"]),
        (["target.name=3"], ["must be text"]),
    ],
)
def test_a_mismatch_says_where_and_what_to_change(
    registry: PluginRegistry, overrides: list[str], messages: list[str]
) -> None:
    found = mismatches(registry, *overrides)
    assert len(found) == 1
    for message in messages:
        assert message in found[0]
    assert "override" in found[0] or "run.yaml" in found[0]


def test_every_mismatch_is_said_at_once(registry: PluginRegistry) -> None:
    changes = {
        "target": {"name": "nowhere"},
        "strategy": {"name": "fancy", "wrong": 1},
        "store": {"name": "absent"},
        "data": {"train": ["a", "b"]},
        "training": {"micro_batch_size": 99},
    }
    assert len(mismatches(registry, **changes)) == 6


def test_schema_holds_installed_sections(registry: PluginRegistry) -> None:
    schema, failures = run_schema(registry)
    assert not failures
    assert {"$ref": "#/$defs/strategy.fancy"} in schema["properties"]["strategy"]["anyOf"]
    assert schema["$defs"]["strategy.fancy"]["properties"]["name"]["const"] == "fancy"
    assert {"type": "null"} in schema["properties"]["store"]["anyOf"]


def test_a_store_that_dies_with_its_process_keeps_nothing_for_a_checkpoint(registry: PluginRegistry) -> None:
    with pytest.raises(PlanError, match=r"loading\.retain.*'memory' ends with its process"):
        plan(registry, topology="colocated", loading={"retain": "checkpoint"})


FAILING_PLACES = {
    "model_post_init": (
        "strategy",
        "    def capture",
        "    def model_post_init(self, _):\n        FAIL\n\n    def capture",
    ),
    "capture_request": ("strategy", "capture_request(self, info):", "capture_request(self, info):\n        FAIL"),
    "describe": ("target", "describe(self):", "describe(self):\n        FAIL"),
}


@pytest.mark.parametrize("failure", ["1 / 0", "raise SystemExit(0)", "raise KeyboardInterrupt"])
@pytest.mark.parametrize("place", list(FAILING_PLACES))
def test_settings_code_that_fails_is_its_distributions(tmp_path, monkeypatch, place: str, failure: str) -> None:
    part, before, after = FAILING_PLACES[place]
    unique = f"{place}-{len(failure)}".replace("_", "-")
    install_strategy(tmp_path / "site", f"{unique}-strategy", "fancy")
    install_target(tmp_path / "site", f"{unique}-target", "fake")
    module = tmp_path / "site" / f"{unique}-{part}.py".replace("-", "_")
    module.write_text(module.read_text().replace(before, after.replace("FAIL", failure)))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("{}\n")
    (problem,) = mismatches(PluginRegistry.discover())
    assert f"{unique}-{part} failed on these settings" in problem
    assert "run.yaml" in problem
