# SPDX-License-Identifier: Apache-2.0
"""Fixtures every test may use: one thread, a tiny real target with prompts for it, and the command line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from command_line import Specforge, start
from tiny_model import TinyModel, write_tiny_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEADLINE_SECONDS = 240


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_traces_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def specforge(tmp_path: Path) -> Specforge:
    """Runs `specforge` in ``tmp_path`` to its end."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, cwd=tmp_path)
        out, err = process.communicate(timeout=DEADLINE_SECONDS)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


WHOLE_RUNS = ("packaging", "flow", "fault", "fuzz", "contract")
"""Folders whose files take longest: processes, servers, environments."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long does not begin last, when one of two workers has nothing left to do."""
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in WHOLE_RUNS)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "tests/fuzz; `make fuzz` is its long version")
    group.addoption("--fuzz-seconds", type=float, default=3.0, help="for each kind of files")
    group.addoption("--fuzz-seed", type=int, default=7)
    group.addoption("--fuzz-only", type=int, help="the number of one change, as a failure names it")
