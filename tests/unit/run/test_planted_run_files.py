# SPDX-License-Identifier: Apache-2.0
"""Files of a run directory in whose place a link lies: nothing is written through it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from specforge_core.contracts import DataError, SpecForgeError, StopSignal
from specforge_core.run.directory import RunDirectory, write_json
from specforge_core.run.supervisor import Half, supervise
from specforge_core.training.metrics_log import MetricsLog


def lock(root: Path) -> None:
    with RunDirectory(root, root / "features").lock("run"):
        pass


def log(root: Path) -> None:
    metrics = MetricsLog(root / "metrics.jsonl", evaluations=root / "evaluations.jsonl")
    metrics.run_started(1, 2)
    evaluation: Any = SimpleNamespace(values=dict)
    metrics.evaluated(2, evaluation)


def supervised(root: Path) -> None:
    halves = [Half(name="train", command=["true"]), Half(name="capture-0", command=["echo", "written"])]
    supervise(halves, main="train", logs=root / "logs", stop=StopSignal(), restarts=0, grace_seconds=5)


def test_a_log_that_claims_a_terabyte_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="longer than"):
        log(tmp_path)


@pytest.mark.parametrize(
    ("place", "act"),
    [
        (".run.lock", lock),
        ("metrics.jsonl", log),
        ("evaluations.jsonl", log),
        ("logs/capture-0.log", supervised),
        ("logs", supervised),
    ],
)
@pytest.mark.parametrize("hard", [False, True])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str, act: Callable[[Path], None], hard: bool) -> None:
    precious, planted = tmp_path / "precious", tmp_path / "run" / place
    planted.parent.mkdir(parents=True)
    if place == "logs":
        precious.mkdir()
    else:
        precious.write_text("kept\n")
    if hard and precious.is_file():
        planted.hardlink_to(precious)
    else:
        planted.symlink_to(precious)
    with suppress(SpecForgeError):  # or another file took the link's place
        act(tmp_path / "run")
    assert list(precious.iterdir()) == [] if precious.is_dir() else precious.read_text() == "kept\n"


def test_a_result_takes_the_place_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "bench.json").symlink_to("precious")
    write_json(tmp_path / "bench.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "kept"
    assert json.loads((tmp_path / "bench.json").read_text()) == {"a": 1}
