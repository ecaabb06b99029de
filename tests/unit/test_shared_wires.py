# SPDX-License-Identifier: Apache-2.0
"""Two halves in one process are joined by one store and one channel, however they race to open them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from specforge_core.contracts import SilentProgress, StopSignal
from specforge_core.run.assemble import Run


class SlowPart:
    """A store or channel that takes a moment to open."""

    def __init__(self, section: Any, context: Any) -> None:
        time.sleep(0.05)


def test_halves_that_open_wires_at_once_share_them(tmp_path: Path) -> None:
    part = SimpleNamespace(factory=f"{__name__}:SlowPart")
    section = SimpleNamespace(directory=tmp_path, token_file=None)
    config = SimpleNamespace(run=section, data=SimpleNamespace(features=None))
    plan: Any = SimpleNamespace(
        config=config, run_id="r", feature_store=part, store_section=None, ref_channel=part, channel_section=None
    )
    run = Run(plan, stop=StopSignal(), progress=lambda half: SilentProgress())
    opened: list[Any] = []
    halves = [threading.Thread(target=lambda: opened.append(run.wires["train"])) for _ in range(2)]
    for half in halves:
        half.start()
    for half in halves:
        half.join(timeout=10)
    assert len(opened) == 2
    assert opened[0] is opened[1]
