# SPDX-License-Identifier: Apache-2.0
"""Shows what the halves of a run are doing: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from specforge_core.contracts import Progress

LINE_EVERY_SECONDS = 10.0
"""Where there is no terminal: often enough to see that it moves, and a log of days stays short."""


def _shown(values: dict[str, float]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


class _BarProgress:
    """One half's bars on a terminal."""

    def __init__(self, half: str, bars: Bars) -> None:
        self._half = half
        self._bars = bars
        self._task: TaskID | None = None
        self._values = ""

    def begin(self, description: str, total: int | None) -> None:
        self._values = ""
        self._task = self._bars.add_task(f"{self._half}: {description}", total=total, note="")

    def advance(self, units: int, **values: float) -> None:
        if self._task is not None:
            self._values = _shown(values) or self._values
            self._bars.update(self._task, advance=units, note=self._values)

    def waiting(self, reason: str | None) -> None:
        if self._task is not None:
            note = f"{self._values}  [yellow]waiting for {reason}[/yellow]" if reason else self._values
            self._bars.update(self._task, note=note)


class _LineProgress:
    """One half's lines where nobody watches: at the beginning, every few seconds, and at the end of a piece of work."""

    def __init__(self, half: str, console: Console) -> None:
        self._half = half
        self._console = console
        self._description = ""
        self._total: int | None = None
        self._done = 0
        self._last = 0.0

    def begin(self, description: str, total: int | None) -> None:
        self._description, self._total, self._done, self._last = description, total, 0, time.monotonic()
        self._print(f"{'' if total is None else total}")

    def advance(self, units: int, **values: float) -> None:
        self._done += units
        now = time.monotonic()
        if self._done == self._total or now - self._last >= LINE_EVERY_SECONDS:
            self._last = now
            of = "" if self._total is None else f"/{self._total}"
            self._print(f"{self._done}{of}  {_shown(values)}")

    def waiting(self, reason: str | None) -> None:
        now = time.monotonic()
        if reason and now - self._last >= LINE_EVERY_SECONDS:
            self._last = now
            self._print(f"{self._done} done, waiting for {reason}")

    def _print(self, text: str) -> None:
        line = f"{self._half}: {self._description} {text}".rstrip()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)  # a log is not cut to 80 columns


class ProgressDisplay:
    """Hands each half its own :class:`Progress`."""

    def __init__(self, console: Console, bars: Bars | None) -> None:
        self._console = console
        self._bars = bars

    def half(self, name: str) -> Progress:
        return _BarProgress(name, self._bars) if self._bars else _LineProgress(name, self._console)


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressDisplay]:
    """Progress on ``console`` (standard error) while the block runs."""
    if not console.is_terminal:
        yield ProgressDisplay(console, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=console, expand=False) as bars:
        yield ProgressDisplay(console, bars)
