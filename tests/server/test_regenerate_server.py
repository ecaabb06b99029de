# SPDX-License-Identifier: Apache-2.0
"""A real server answers a run's prompts: the ids that it returns are those of our own rendering and our own engine.

`make test-server` names the Python that has vLLM in SPECFORGE_VLLM_PYTHON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml
from command_line import start
from specforge_core import DemoTarget
from specforge_core.contracts import SilentProgress
from specforge_hf_target.demo_target import prepare_within
from specforge_hf_target.demo_training import DemoBudget

pytestmark = [pytest.mark.server, pytest.mark.timeout(0)]

BUDGET = DemoBudget(steps=120, answered_prompts=24, held_out_prompts=4, answer_tokens=24, max_files=120)
START_SECONDS, COMMAND_SECONDS = 600.0, 900.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> DemoTarget:
    return prepare_within(tmp_path_factory.mktemp("demo"), budget=BUDGET, progress=SilentProgress())


@pytest.fixture(scope="module")
def address(target: DemoTarget, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = os.environ.get("SPECFORGE_VLLM_PYTHON", "")
    if not python:
        pytest.skip("SPECFORGE_VLLM_PYTHON names no Python that has vLLM; run `make test-server`")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target.section["path"]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "512"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        _wait_for(port, process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def _regenerate(root: Path, target: DemoTarget, name: str, **section: object) -> list[dict[str, object]]:
    values = {
        "run": {"directory": str(root / name)},
        "target": {"name": "hf", **target.section},
        "strategy": {"name": "eagle3"},
        "data": {"train": [str(target.train_prompts)], "max_length": 256},
        "regenerate": {"max_tokens": target.answer_tokens, **section},
    }
    (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    process = start("regenerate", f"{name}.yaml", cwd=root)
    _, err = process.communicate(timeout=COMMAND_SECONDS)
    assert process.returncode == 0, err
    files = sorted((root / name / "regenerated" / "train").glob("answers-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_server_returns_the_tokens_that_our_engine_gives(target: DemoTarget, address: str, tmp_path: Path) -> None:
    served = _regenerate(tmp_path, target, "served", servers=[address])
    ours = _regenerate(tmp_path, target, "ours")
    assert [row["id"] for row in served] == [row["id"] for row in ours]
    assert all(row.get("input_ids") for row in served), "the server returns token ids"
    alike = sum(row["input_ids"] == other["input_ids"] for row, other in zip(served, ours, strict=True))
    assert alike >= 0.9 * len(ours), "greedy answers differ in near ties only"
