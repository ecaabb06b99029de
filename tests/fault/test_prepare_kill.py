# SPDX-License-Identifier: Apache-2.0
"""A preparation that is killed at any moment goes on where it was, gives the same set, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preparing import FirstAdvance, Interrupting, contents, mixed_rows, prepare, talk, write_rows
from specforge_core.prompts import prepare as preparation
from specforge_core.prompts.prompt_set import PromptSet

SCRIPT = Path(__file__).parents[1] / "support" / "prepare_until_killed.py"
DEADLINE_SECONDS = 120


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "a.jsonl", mixed_rows(400))


def start(source: Path, directory: Path, *, workers: int, rows: int, seed: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(source), str(directory), str(workers), str(rows), str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("workers", "rows"), [(1, 80), (2, 200)])
def test_sigkill_at_random_moments(tmp_path: Path, source: Path, workers: int, rows: int) -> None:
    whole = contents(prepare([source], tmp_path / "whole"))
    with start(source, tmp_path / "set", workers=workers, rows=rows) as process:
        out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    told = json.loads(out)
    assert told["deaths"] > 0
    assert told["found"] == sorted(told["found"]), "what was saved is kept"
    assert max(told["found"]) > 0, "something was saved before a kill"
    assert contents(PromptSet.open(tmp_path / "set")) == whole
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.jsonl", "whole", ".whole.lock", "set", ".set.lock"}


@pytest.fixture
def partial(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an interrupted preparation of ``set`` left."""
    with monkeypatch.context() as often:
        often.setattr(preparation, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "set", progress=Interrupting(200))
    partial = tmp_path / ".set.partial"
    assert sorted(path.name for path in partial.iterdir()) == ["places.i64", "progress.json", "set"]
    return partial


@pytest.mark.parametrize("name", ["progress.json", "set/input_ids.i32", "places.i64", "set/rejects.jsonl"])
@pytest.mark.parametrize("change", ["a bit", "cut", "gone", "longer", "a link"])
def test_what_was_saved_and_then_damaged_is_not_gone_on_with(tmp_path, source, partial, name, change) -> None:
    content = (partial / name).read_bytes()
    (partial / name).unlink()
    middle = len(content) // 3
    if change == "a link":
        (tmp_path / "precious").write_bytes(content)
        (partial / name).symlink_to(tmp_path / "precious")
    elif change != "gone":
        bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (partial / name).write_bytes({"a bit": bit, "cut": content[:middle], "longer": content + b"torn"}[change])
    progress = FirstAdvance()
    again = prepare([source], tmp_path / "set", progress=progress)
    assert contents(again) == contents(prepare([source], tmp_path / "whole"))
    if change == "longer" and name != "progress.json":
        assert progress.rows == 192, "what was torn is cut off"
    else:
        assert progress.rows == 0
    assert not partial.exists()
    assert change != "a link" or (tmp_path / "precious").read_bytes() == content


def test_a_partial_directory_that_is_a_link_is_refused(tmp_path: Path, source: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    (tmp_path / ".set.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(preparation.DataError, match="symbolic link"):
        prepare([source], tmp_path / "set")
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


@pytest.mark.parametrize("settings", [{"max_length": 50}, {"samples": "turn"}, {"max_bad_rows": 999}])
def test_other_settings_begin_anew(tmp_path: Path, source: Path, partial: Path, settings: dict[str, object]) -> None:
    progress = FirstAdvance()
    again = prepare([source], tmp_path / "set", progress=progress, **settings)
    assert progress.rows == 0
    assert contents(again) == contents(prepare([source], tmp_path / "whole", **settings))
    assert not partial.exists()


def test_an_interrupted_preparation_goes_on(tmp_path: Path, source: Path, partial: Path) -> None:
    progress = FirstAdvance()
    again = prepare([source], tmp_path / "set", progress=progress, workers=2)
    assert progress.rows == 192
    assert contents(again) == contents(prepare([source], tmp_path / "whole"))
    assert not partial.exists()


def test_workers_end_with_the_process_that_reads(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", [talk("TAKE-YOUR-TIME")] * 10_000)
    with start(source, tmp_path / "set", workers=2, rows=100_000) as process:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(workers := grandchildren(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        [preparing] = children(process.pid)
        process.kill()  # first, so that it starts no other
        os.kill(preparing, signal.SIGKILL)
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def grandchildren(pid: int) -> list[int]:
    """The workers, and not what keeps track of what they share."""
    below = [grandchild for child in children(pid) for grandchild in children(child)]
    return [pid for pid in below if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
