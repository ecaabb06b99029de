# SPDX-License-Identifier: Apache-2.0
"""Bad inputs, a table: each ends with exit status 2 and one message that says where, what and what to do.

Most rows run in this process, because importing torch once for each would take minutes; a few run as processes of
their own. Whatever was on disk before is compared byte by byte afterwards: a refused command loses nothing.
"""

from __future__ import annotations

import fnmatch

import bad_plugins
import bad_prompts
import bad_results
import bad_run_files
import bad_targets
import pytest
from bad_input import BadInput, Workshop, contents
from command_line import start
from specforge_core.cli.main import main

TABLE = [
    *bad_run_files.TABLE,
    *bad_plugins.TABLE,
    *bad_targets.TABLE,
    *bad_prompts.TABLE,
    *bad_results.TABLE,
]
LOCKS = ("*.lock", "*/store/.counts")  # who is there now, not what was kept
AS_PROCESSES = ("run file missing", "layer out of range", "line that is no JSON", "features cut short")


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


def test_rows_that_train_nothing_are_counted_aloud(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = workshop.prompts(bad_prompts.GOOD, {"messages": [bad_prompts.ASK]})
    with pytest.raises(SystemExit) as ended:
        main(["capture", run_file])
    assert ended.value.code == 0
    assert "data.train: 1 prompts; 1 rows left out, which train no token" in capsys.readouterr().err


def test_the_table_is_large_and_names_each_row_once() -> None:
    names = [row.name for row in TABLE]
    assert len(names) >= 48
    assert len(set(names)) == len(names)
    assert set(AS_PROCESSES) <= set(names)
