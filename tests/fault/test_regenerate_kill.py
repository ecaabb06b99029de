# SPDX-License-Identifier: Apache-2.0
"""Regeneration that is killed, and shared: the same rows, byte for byte, and nothing made twice or left behind."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from chat_service import ChatService, serving
from command_line import make_run_file, start
from tiny_model import TinyModel

REGENERATE = {"max_tokens": 6, "batch_size": 4}


def made(run: Path) -> bytes:
    assert sorted(path.name for path in (run / "regenerated").iterdir()) == [
        ".train.lock",
        "train",
        "train.manifest.json",
    ]
    assert [path.name for path in (run / "regenerated" / "train").iterdir()] == ["rows.jsonl"]
    return (run / "regenerated" / "train" / "rows.jsonl").read_bytes()


def finish(*arguments: str, cwd: Path) -> str:
    process = start("regenerate", *arguments, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out + err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> bytes:
    root = tmp_path_factory.mktemp("whole")
    run_file = make_run_file(tiny_model, root / "run.yaml", regenerate=REGENERATE)
    assert "conversations" in finish(str(run_file), cwd=root)
    return made(root / "run")


def test_killed_and_shared_regenerations_make_the_same_rows(
    tmp_path: Path, tiny_model: TinyModel, whole: bytes
) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "run.yaml", regenerate=REGENERATE)
    work, chance = tmp_path / "run" / "regenerated" / "train" / ".work", random.Random(7)
    for _ in range(2):
        process = start("regenerate", str(run_file), cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not list(work.glob("*.journal")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=60)
    both = [start("regenerate", str(run_file), cwd=tmp_path) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert made(tmp_path / "run") == whole
    again = finish(str(run_file), cwd=tmp_path)  # there is nothing left to make
    assert "conversations" in again
    rows = [json.loads(line) for line in whole.splitlines()]
    assert all(any(row["loss_mask"]) for row in rows)


def test_servers_are_asked_once_for_what_was_kept(tmp_path: Path, tiny_model: TinyModel) -> None:
    with serving(ChatService(seconds=0.1)) as service:
        section = {**REGENERATE, "servers": [service.address], "concurrency": 2}
        run_file = make_run_file(tiny_model, tmp_path / "run.yaml", regenerate=section)
        process = start("regenerate", str(run_file), cwd=tmp_path)
        deadline = time.monotonic() + 60
        while sum(service.asked.values()) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
        finish(str(run_file), cwd=tmp_path)
        rows = made(tmp_path / "run").splitlines()
    asked_twice = sum(service.asked.values()) - len(rows)
    assert 0 <= asked_twice <= 2, "only what was in flight"


def test_other_settings_do_not_mix_with_what_was_made(tmp_path: Path, tiny_model: TinyModel) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "run.yaml", regenerate=REGENERATE)
    finish(str(run_file), "--limit", "2", cwd=tmp_path)
    process = start("regenerate", str(run_file), "--limit", "2", "regenerate.max_tokens=7", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "made otherwise: settings differ" in err
    assert "Traceback" not in err
