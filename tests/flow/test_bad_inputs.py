# SPDX-License-Identifier: Apache-2.0
"""Bad inputs, a table: each ends with exit status 2 and one message that says where, what and what to do.

Most rows run in this process, because importing torch once for each would take minutes; a few run as processes of
their own. Whatever was on disk before is compared byte by byte afterwards: a refused command loses nothing.
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import bad_plugins
import bad_prompts
import bad_results
import bad_run_files
import bad_targets
import pytest
from bad_input import RUN, BadInput, Workshop, contents
from command_line import start
from specforge_core.cli.main import main
from tiny_model import TinyModel

TABLE = [
    *bad_run_files.TABLE,
    *bad_plugins.TABLE,
    *bad_targets.TABLE,
    *bad_prompts.TABLE,
    *bad_results.TABLE,
]
LOCKS = ("*.lock",)
AS_PROCESSES = ("run file missing", "layer out of range", "line that is no JSON", "features cut short")


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


def check(row: BadInput, workshop: Workshop, before: dict[str, bytes], *, status: object, err: str) -> None:
    """The four things every row must show."""
    assert status == 2, err
    assert "Traceback" not in err
    messages = [line for line in err.splitlines() if line.lower().startswith("error: ")]
    assert len(messages) == 1, err
    missing = [fragment for fragment in row.says if fragment not in err]
    assert not missing, f"{missing} not in:\n{err}"
    after, may_change = contents(workshop.root), (*LOCKS, *row.changes)
    lost = [name for name, content in before.items() if after.get(name) != content]
    assert [name for name in lost if not any(fnmatch.fnmatch(name, free) for free in may_change)] == []


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_is_refused(row: BadInput, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = row.spoil(workshop)
    before = contents(workshop.root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    check(row, workshop, before, status=ended.value.code, err=capsys.readouterr().err)


@pytest.mark.parametrize("row", [row for row in TABLE if row.name in AS_PROCESSES], ids=lambda row: row.name)
def test_is_refused_by_a_process(row: BadInput, workshop: Workshop) -> None:
    arguments = row.spoil(workshop)
    before = contents(workshop.root)
    process = start(*arguments, cwd=workshop.root)
    _, err = process.communicate(timeout=120)
    check(row, workshop, before, status=process.returncode, err=err)


def test_the_table_is_large_and_names_each_row_once() -> None:
    names = [row.name for row in TABLE]
    assert len(names) >= 48
    assert len(set(names)) == len(names)
    assert set(AS_PROCESSES) <= set(names)
