# SPDX-License-Identifier: Apache-2.0
"""The same prompts end with the same weights, bit for bit, wherever the two halves run and whatever joins them."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Specforge, make_run_file, start
from mooncake_service import mooncake_service
from redis_service import redis_service
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(600)

TOKEN = "a secret of at least sixteen characters"


def last_checkpoint(run: Path) -> dict[str, str]:
    """Digests of the tensor files of the last checkpoint."""
    tensors = sorted(run.glob("checkpoints/step-*"))[-1] / "tensors"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tensors.glob("*.safetensors"))}


def dealt(run: Path) -> list[tuple[int, str]]:
    """Which sample was trained in which window, by the ledger."""
    with sqlite3.connect(run / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT step, sample_id FROM deals WHERE step >= 0 AND trained ORDER BY step, sample_id")
        return [(int(step), str(sample)) for step, sample in rows]


@pytest.fixture(scope="module")
def colocated(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("equal")
    run_file = make_run_file(tiny_model, directory / "colocated.yaml", topology="colocated")
    running = start("run", str(run_file), cwd=directory)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 0, said
    return directory / "colocated"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Sections of a store on a real Mooncake master and a channel on a real Redis with a password."""
    with mooncake_service() as mooncake, redis_service(tmp_path / "redis", password="s3cret") as redis:
        yield {
            "store": {"name": "mooncake", "master": mooncake.address, "host": "127.0.0.1", "segment_bytes": 64 << 20},
            "channel": {"name": "redis", "url": redis.url},
        }
        assert mooncake.keys(containing=".e") == [], "features were left on the server"


def run_disaggregated(specforge: Specforge, tiny_model: TinyModel, directory: Path, **sections: Any) -> Path:
    token_file = directory / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    run_file = make_run_file(
        tiny_model,
        directory / "apart.yaml",
        topology="disaggregated",
        run={"token_file": str(token_file)},
        capture={"processes": 2},
        **sections,
    )
    done = specforge("run", str(run_file))
    assert done.returncode == 0, done.stderr
    return directory / "apart"


def test_files_between_processes(specforge: Specforge, tiny_model: TinyModel, colocated: Path, tmp_path: Path) -> None:
    run = run_disaggregated(specforge, tiny_model, tmp_path)
    assert last_checkpoint(run) == last_checkpoint(colocated) != {}
    assert dealt(run) == dealt(colocated)
    assert len(dealt(run)) == len(set(dealt(run))) == 48
    assert list((run / "features" / "train" / "store").rglob("*.safetensors")) == []


def test_mooncake_and_redis_between_processes(
    specforge: Specforge, tiny_model: TinyModel, colocated: Path, tmp_path: Path, services: dict[str, Any]
) -> None:
    run = run_disaggregated(specforge, tiny_model, tmp_path, **services)
    assert last_checkpoint(run) == last_checkpoint(colocated) != {}
    assert dealt(run) == dealt(colocated)
    assert not (run / "features" / "train" / "store").exists()


def test_a_machine_with_other_data_leaves_and_the_run_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    apart = {
        "topology": "disaggregated",
        "store": {"name": "file", "path": str(tmp_path / "store")},
        "channel": {"name": "file", "path": str(tmp_path / "refs")},
    }
    run_file = make_run_file(tiny_model, tmp_path / "apart.yaml", run={"id": "one"}, **apart)
    other = make_run_file(tiny_model, tmp_path / "other.yaml", run={"id": "one"}, data={"max_length": 32}, **apart)
    training = start("train", str(run_file), cwd=tmp_path)
    try:
        stranger = start("capture", str(other), cwd=tmp_path)
        _, said = stranger.communicate(timeout=120)
        assert stranger.returncode == 2, said
        assert "another set of prompts" in said
        capture = start("capture", str(run_file), cwd=tmp_path)
        _, said = training.communicate(timeout=120)
        assert training.returncode == 0, said
        _, said = capture.communicate(timeout=120)
        assert capture.returncode == 0, said
    finally:
        training.kill()
