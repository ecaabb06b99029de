# SPDX-License-Identifier: Apache-2.0
"""A dozen faults against disaggregated runs, over files and over Mooncake and Redis. `make chaos` injects hundreds."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from chaos import Campaign
from chaos_oracle import problems_of
from mooncake_service import require_mooncake
from redis_service import require_redis
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(400)

SEED = 11
FAULTS = 6
LONGEST_SECONDS = 180.0


@pytest.fixture(scope="module")
def campaign(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path_factory.mktemp("chaos"), tiny_model, SEED)
    yield campaign
    print(campaign.table())


def test_faults_over_files_change_nothing(campaign: Campaign) -> None:
    campaign.run("file", FAULTS, seconds=LONGEST_SECONDS)


def test_faults_over_mooncake_and_redis_change_nothing(campaign: Campaign) -> None:
    require_mooncake()
    require_redis()
    campaign.run("services", FAULTS, seconds=LONGEST_SECONDS)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("DELETE FROM deals WHERE step = 5 AND place = 3", "window 5 holds"),
        ("UPDATE deals SET sample_id = (SELECT sample_id FROM deals WHERE step = 7 LIMIT 1) WHERE step = 6", "trained"),
        ("UPDATE deals SET trained = 0 WHERE step = 9 AND place = 0", "not trained"),
        ("UPDATE deals SET generation = 0 WHERE step = 9 AND place = 0", "skipped"),
        ("UPDATE samples SET freed = 0 WHERE place = 20", "never freed"),
        ("DELETE FROM deals WHERE step = -2", "held-out"),
    ],
)
def test_the_oracle_rejects_what_is_wrong(campaign: Campaign, tmp_path: Path, damage: str, found: str) -> None:
    reference = campaign.reference()
    run = shutil.copytree(campaign.root / "undisturbed" / "run", tmp_path / "run")
    with closing(sqlite3.connect(run / "ledger.sqlite")) as ledger, ledger:
        assert ledger.execute(damage).rowcount > 0
    assert found in "\n".join(problems_of(run, reference))


def test_the_oracle_rejects_other_weights(campaign: Campaign, tmp_path: Path) -> None:
    reference = campaign.reference()
    run = shutil.copytree(campaign.root / "undisturbed" / "run", tmp_path / "run")
    latest = (run / "checkpoints" / "latest").read_text().strip()
    path = min((run / "checkpoints" / latest / "tensors").rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert problems_of(run, reference) == ["the last checkpoint's tensors differ"]
