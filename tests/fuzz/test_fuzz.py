# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes stand in a file: the product's own error or the same values, soon, and in little memory.

A change is made from the seed and its number alone, so a failure names what repeats it:
``pytest tests/fuzz -k SUBJECT --fuzz-seed S --fuzz-only N``.
"""

from __future__ import annotations

import resource
import shutil
import time
import traceback
from itertools import count
from pathlib import Path
from random import Random

import pytest
from specforge_core.contracts import SpecForgeError
from subjects import SUBJECTS, Subject

MOST_SECONDS = 10.0
MOST_GROWTH_BYTES = 1 << 30


@pytest.mark.parametrize("name", list(SUBJECTS))
def test_changed_files_are_refused_or_read_the_same(name: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    subject, seed = SUBJECTS[name], pytestconfig.getoption("--fuzz-seed")
    honest = tmp_path / "honest"
    honest.mkdir()
    given = subject.make(honest)
    expected = subject.read(copied(honest, tmp_path), given)
    only, faults = pytestconfig.getoption("--fuzz-only"), list[str]()
    until = time.monotonic() + pytestconfig.getoption("--fuzz-seconds")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in count() if only is None else [only]:
        directory = copied(honest, tmp_path)
        fault = try_one(subject, directory, Random(f"{name} {seed} {number}"), given, expected)
        if fault:
            faults.append(f"change {number} of {fault}")
        if time.monotonic() > until or len(faults) >= 5:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MOST_GROWTH_BYTES, f"{grown >> 20} MB more"
    assert not faults, "\n".join(["", *faults, f"{number + 1} changes were tried, seed {seed}"])


def copied(honest: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "changed"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(honest, directory)
    return directory


def try_one(subject: Subject, directory: Path, chance: Random, given: object, expected: object) -> str:
    """What is wrong with what came of one change; empty for nothing."""
    path = chance.choice(sorted(path for path in directory.glob(subject.files) if path.is_file()))
    changed = subject.change(path.read_bytes(), chance)
    path.write_bytes(changed)
    subject.then(directory)
    began, said = time.monotonic(), ""
    try:
        said = subject.judge(expected, subject.read(directory, given))
    except SpecForgeError as error:
        said = "" if str(error).strip() else "an error without a word"
    except Exception:  # noqa: BLE001 - whatever it is, it is what is looked for
        said = traceback.format_exc(limit=-4)
    seconds = time.monotonic() - began
    if seconds > MOST_SECONDS:
        said = f"{seconds:.0f} s; {said}"
    return said and f"{path.relative_to(directory)} ({changed[:80]!r}…): {said}"
