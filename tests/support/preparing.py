# SPDX-License-Identifier: Apache-2.0
"""Rows of every kind, prepared with the tiny tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from armed_tokenizer import VOCABULARY, Armed
from specforge_core.config.run_config import DataSection
from specforge_core.contracts import SilentProgress
from specforge_core.prompts.prepare import prepare_prompts
from specforge_core.prompts.prompt_set import PromptSet


def talk(*answers: str, **more: Any) -> dict[str, Any]:
    """A row."""
    turns = [
        turn
        for number, answer in enumerate(answers)
        for turn in ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer})
    ]
    return {"messages": turns, **more}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def mixed_rows(count: int, *, seed: int = 5) -> list[Any]:
    """Rows of every kind: conversations short and long, tokens, rows that train nothing, rows that cannot be used."""
    generator = random.Random(seed)
    rows: list[Any] = []
    for number in range(count):
        kind = generator.random()
        if kind < 0.03:
            rows.append("{ no JSON")
        elif kind < 0.06:
            rows.append({"messages": [{"role": "wizard", "content": "hi"}]})
        elif kind < 0.1:
            rows.append({"input_ids": [1, 2, 3], "loss_mask": [0, generator.randrange(2), 0]})
        elif kind < 0.15:
            rows.append(talk("again", id=f"given-{generator.randrange(40)}", mood="odd"))
        else:
            rows.append(talk(*[f"answer {number} " * generator.randint(1, 9)] * generator.randint(1, 3)))
    return rows


def prepare(
    sources: list[Path], directory: Path, *, tokenizer: Any = None, progress: Any = None, **settings: Any
) -> PromptSet:
    """Prepare with the tiny tokenizer; rows that cannot be used are skipped unless ``settings`` say otherwise."""
    values = {"train": sources, "max_length": 96, "on_bad_row": "skip", **settings}
    return prepare_prompts(
        sources,
        directory=directory,
        tokenizer=tokenizer or Armed(),
        settings=DataSection(**values),
        vocab_size=VOCABULARY,
        progress=progress or SilentProgress(),
    )


def contents(prompts: PromptSet) -> dict[str, bytes]:
    """Every file of a set."""
    return {path.name: path.read_bytes() for path in sorted(prompts.directory.iterdir())}


class FirstAdvance(SilentProgress):
    """How many rows were done before."""

    rows = -1

    def advance(self, units: int, **values: float) -> None:
        if self.rows < 0:
            self.rows = units


class Interrupting(SilentProgress):
    """Ctrl-C after so many rows."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, units: int, **values: float) -> None:
        self._left -= units
        if self._left < 0:
            raise KeyboardInterrupt
