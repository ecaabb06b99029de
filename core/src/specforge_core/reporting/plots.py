# SPDX-License-Identifier: Apache-2.0
"""Draws a run's pictures with matplotlib, which is an extra and imported here only. Second step of the report."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from specforge_core.contracts import DataError
from specforge_core.reporting.records import RunRecords, series

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
MAX_POSITIONS = 24
"""The most draft positions that are drawn: a legend of more does not fit beside its curves."""
SMOOTH_OVER = 25
"""Optimizer steps that a smoothed curve averages over."""


def draw_plots(records: RunRecords) -> dict[str, bytes]:
    """PNG files by name, in reading order; a picture that has no data is left out.

    :raises DataError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(
            "reports need matplotlib, which is not installed",
            where="specforge report",
            hint="pip install 'specforge-core[report]'",
        ) from error
    pictures: dict[str, bytes] = {}
    for name, (title, draw) in _PLOTS.items():
        figure = Figure(figsize=(7.2, 3.8), dpi=120, layout="constrained")
        axes = figure.subplots()
        if draw(axes, records):
            _finish(axes, title)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            pictures[name] = buffer.getvalue()
    return pictures


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)


def _draw_curve(axes: Any, records: RunRecords, name: str) -> bool:
    """A metric of training, faint and smoothed, and of evaluation, as points."""
    steps, values = series(records.steps, name)
    held_steps, held_values = series(records.evaluations, name)
    if steps:
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(steps, smooth(values, SMOOTH_OVER), color=BLUE, label=f"train (mean of {SMOOTH_OVER} steps)")
    if held_steps:
        axes.plot(held_steps, held_values, color=ORANGE, marker="o", label="held out")
    axes.set_xlabel("optimizer step")
    return bool(steps or held_steps)


def _draw_loss(axes: Any, records: RunRecords) -> bool:
    axes.set_ylabel("loss [nats, as the strategy weighs it]")
    return _draw_curve(axes, records, "loss")


def _draw_learning_rate(axes: Any, records: RunRecords) -> bool:
    steps, values = series(records.steps, "learning_rate")
    axes.plot(steps, values, color=BLUE)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return bool(steps)


def _draw_acceptance(axes: Any, records: RunRecords) -> bool:
    axes.set_ylabel("τ [tokens per target pass]")
    return _draw_curve(axes, records, "simulated_acceptance_length")


def _draw_positions(axes: Any, records: RunRecords) -> bool:
    """Accuracy at each draft position: of evaluations where there are any, else of training."""
    from matplotlib import colormaps

    rows = records.evaluations or records.steps
    count = 0
    while count < MAX_POSITIONS and series(rows, f"accuracy_{count}")[0]:
        count += 1
    for position in range(count):
        steps, values = series(rows, f"accuracy_{position}")
        shown = values if records.evaluations else smooth(values, SMOOTH_OVER)
        color = colormaps["viridis"](position / max(count, 1))
        axes.plot(
            steps, shown, color=color, marker="o" if records.evaluations else "", label=f"position {position + 1}"
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("accuracy" + (" (held out)" if records.evaluations else " (train)"))
    return bool(count)


def _draw_throughput(axes: Any, records: RunRecords) -> bool:
    steps, values = series(records.steps, "tokens_per_second")
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1)
    axes.plot(steps, smooth(values, SMOOTH_OVER), color=BLUE, label=f"mean of {SMOOTH_OVER} steps")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("tokens per second")
    return bool(steps)


def _draw_waiting(axes: Any, records: RunRecords) -> bool:
    steps, waited = series(records.steps, "waited_seconds")
    _, busy = series(records.steps, "seconds")
    if not steps or len(busy) != len(waited):
        return False
    shares = [100 * w / (w + b) if w + b else 0.0 for w, b in zip(waited, busy, strict=True)]
    axes.fill_between(steps, shares, color=ORANGE, alpha=0.25, linewidth=0)
    axes.plot(steps, smooth(shares, SMOOTH_OVER), color=ORANGE, label=f"mean of {SMOOTH_OVER} steps")
    axes.set_ylim(0, 100)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("waiting for features [% of step time]")
    return True


def _draw_bench(axes: Any, records: RunRecords) -> bool:
    if records.bench is None:
        return False
    acceptance = records.bench["position_acceptance"]
    positions = list(range(1, len(acceptance) + 1))
    bars = axes.bar(positions, [value or 0.0 for value in acceptance], color=BLUE, width=0.6)
    labels = ["never proposed" if value is None else f"{value:.2f}" for value in acceptance]
    axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(positions)
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("draft position")
    axes.set_ylabel("accepted / proposed")
    return bool(acceptance)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` values at each place."""
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


_PLOTS: dict[str, tuple[str, Callable[[Any, RunRecords], bool]]] = {
    "acceptance.png": ("Simulated acceptance length", _draw_acceptance),
    "loss.png": ("Loss", _draw_loss),
    "position_accuracy.png": ("Accuracy at each draft position", _draw_positions),
    "bench.png": ("Bench: acceptance at each draft position", _draw_bench),
    "throughput.png": ("Training throughput", _draw_throughput),
    "waiting.png": ("Share of time spent waiting", _draw_waiting),
    "learning_rate.png": ("Learning rate", _draw_learning_rate),
}

PLOT_TITLES = {name: title for name, (title, _) in _PLOTS.items()}
