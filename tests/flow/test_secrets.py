# SPDX-License-Identifier: Apache-2.0
"""A password that a user gives on the command line is nowhere else afterwards: no process, message, log or file."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from command_line import make_run_file, start
from tiny_model import TinyModel

pytestmark = pytest.mark.timeout(240)

SECRET = "wonderful-secret"


def command_lines(process: psutil.Process) -> list[str]:
    """Of the children; a child that has not begun its own program yet still shows its parent's."""
    try:
        own = process.cmdline()
        lines = [child.cmdline() for child in process.children(recursive=True)]
        return [" ".join(line) for line in lines if line != own]
    except psutil.NoSuchProcess:
        return []


def test_processes_of_a_run_do_not_show_an_overrides_password(tiny_model: TinyModel, tmp_path: Path) -> None:
    run_file = make_run_file(tiny_model, tmp_path / "run.yaml", topology="disaggregated")
    channel = ("channel.name=redis", f"channel.url=redis://:{SECRET}@127.0.0.1:1/0", "channel.reconnect_seconds=0")
    process = start("run", str(run_file), *channel, cwd=tmp_path)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= set(command_lines(psutil.Process(process.pid)))
        time.sleep(0.05)
    out, err = process.communicate()
    assert any(" capture " in line for line in seen)
    assert any(" train " in line for line in seen)
    assert process.returncode == 2, err
    assert "cannot be reached" in err, "the override came through"
    written = [path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not [text for text in [*seen, out, err, *written] if SECRET in text]
