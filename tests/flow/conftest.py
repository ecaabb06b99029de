# SPDX-License-Identifier: Apache-2.0
"""What the tables of bad inputs start from: one finished run, copied into a workshop for each row."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_input import RUN, Workshop
from command_line import start
from tiny_model import TinyModel


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A finished run: captured, trained, exported."""
    root = tmp_path_factory.mktemp("trained")
    run_file = Workshop(root, tiny_model, root / RUN).run_file()
    for command in (["run", run_file], ["export", RUN]):
        process = start(*command, cwd=root)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return root / RUN


@pytest.fixture
def workshop(
    tmp_path: Path, trained: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workshop]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    workshop = Workshop(tmp_path, tiny_model, trained)
    yield workshop
    for handle in workshop.held:
        handle.close()
    shutil.rmtree(tmp_path, ignore_errors=True)
