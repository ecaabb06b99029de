# SPDX-License-Identifier: Apache-2.0
"""Started by test_file_store_kills.py: does one thing to a file store, dying by SIGKILL at its n-th line, for every n.

    python kill_at_every_line.py DIRECTORY ACTION

Each time a child of this process, which holds what was put before, is killed before the n-th line that it runs in the
store's modules; then the store is opened as the next process would, and looked at. Ends when the child got through.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from specforge_core.contracts import FeatureGone, PartContext, SampleRef, StaleRef
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileStoreConfig
from specforge_core.testing.samples import assert_same, make_sample

MODULES = ("file_store.py", "sample_place.py", "store_counts.py", "store_aside.py", "store_access.py")
OLD, NEW = 1, 2


def open_store(directory: Path, token: str | None = None) -> FileStore:
    return FileStore(
        FileStoreConfig(name="file", path=directory), PartContext(run_id="run", directory=directory, token=token)
    )


def die_at_line(number: int) -> None:
    """From here on this process runs ``number - 1`` lines of the store's modules."""
    left = number

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        if os.path.basename(frame.f_code.co_filename) not in MODULES:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Whether the child died there; else it came to its end."""
    child = os.fork()
    if child == 0:
        die_at_line(number)
        act()
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"the child failed at line {number}"
    return os.WIFSIGNALED(status)


def look(directory: Path, old: SampleRef, may_be: set[int]) -> None:
    """The next process: nothing is left over, counts are exact, the id holds one whole sample or none."""
    store = open_store(directory)
    places = list(directory.glob("??/*"))
    sizes = [place.stat().st_size for place in places]
    assert all(place.suffix == ".safetensors" for place in places), places
    assert list(directory.glob(".aside/*")) == []
    assert {path.name for path in directory.iterdir() if path.name.startswith(".")} <= {".aside", ".counts", ".access"}
    assert (store.usage().samples, store.usage().nbytes) == (len(sizes), sum(sizes))
    held = 0
    try:
        assert_same(store.get(old), make_sample(OLD))
        held = OLD
    except StaleRef:
        held = NEW
    except FeatureGone:
        pass
    assert held in may_be, f"holds {held} where one of {may_be} belongs"
    again = store.put("p.e0", make_sample(NEW))
    assert again.generation > old.generation
    assert_same(store.get(again), make_sample(NEW))


def main(directory: Path, action: str) -> None:
    torch.set_num_threads(1)
    number = deaths = 0
    died = True
    while died:
        number += 1
        shutil.rmtree(directory, ignore_errors=True)
        store = open_store(directory)
        old = store.put("p.e0", make_sample(OLD))
        if action == "put":
            died = killed_at(number, lambda store=store: store.put("p.e0", make_sample(NEW)))
            may_be = {OLD, NEW} if died else {NEW}
        elif action == "delete":
            died = killed_at(number, lambda store=store, old=old: store.delete(old))
            may_be = {OLD, 0} if died else {0}
        else:
            died = killed_at(number, lambda: open_store(directory).close())
            may_be = {OLD}
        look(directory, old, may_be)
        deaths += died
    print(json.dumps({"deaths": deaths}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
