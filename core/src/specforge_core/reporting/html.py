# SPDX-License-Identifier: Apache-2.0
"""Writes a run's page: one HTML file that asks nothing of the network. Third step of the report.

Whatever stands in a run's files is text on the page: :func:`as_text` is the only way in.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from specforge_core.reporting.plots import PLOT_TITLES
from specforge_core.reporting.records import RunRecords, series

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#0f172a;background:#f8fafc;margin:0}
main{max-width:1120px;margin:0 auto;padding:32px 20px}
h1{margin:0 0 4px;font-size:28px} h2{margin:36px 0 12px;font-size:20px} .muted{color:#64748b}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.card{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px 16px}
.card b{display:block;font-size:24px} .card span{color:#64748b;font-size:14px} .bad b{color:#b91c1c}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:16px}
figure{margin:0;background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:8px} img{width:100%;display:block}
table{border-collapse:collapse;background:#fff;width:100%}
td,th{border:1px solid #e2e8f0;padding:6px 12px;text-align:left}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px;overflow:auto;font-size:13px}
summary{cursor:pointer;font-weight:600;margin:12px 0}
"""


def render_page(records: RunRecords, pictures: Mapping[str, bytes]) -> str:
    """The whole page, pictures included."""
    absent = [title for name, title in PLOT_TITLES.items() if name not in pictures]
    figures = "".join(
        f'<figure><img alt="{as_text(PLOT_TITLES[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(content).decode()}"></figure>'
        for name, content in pictures.items()
    )
    parts = [
        f"<h1>{as_text(records.name)}</h1>",
        f'<p class="muted">{as_text(_subtitle(records))}</p>',
        _render_cards(records),
        f'<div class="plots">{figures}</div>' if figures else "",
        f'<p class="muted">Not recorded by this run: {as_text(", ".join(absent))}.</p>' if absent else "",
        "<h2>Bench</h2>",
        _render_bench(records.bench),
        "<h2>Run</h2>",
        _render_file("Resolved configuration", records.config),
        _render_file("Provenance", records.provenance)
        if records.provenance is not None
        else '<p class="muted">No provenance was recorded.</p>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{as_text(records.name)} · SpecForge report</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def as_text(value: object) -> str:
    """A value from a run's files as HTML: no markup, and nothing that a browser does not show (control characters,
    marks that turn the direction of writing, halves of surrogate pairs)."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(value))
    return escape("".join(shown))


def _subtitle(records: RunRecords) -> str:
    strategy, target, topology = (records.names.get(key, "unknown") for key in ("strategy", "target", "topology"))
    return f"strategy {strategy} · target engine {target} · topology {topology}"


def _render_cards(records: RunRecords) -> str:
    cards: list[tuple[str, str, bool]] = []
    steps, losses = series(records.steps, "loss")
    if steps:
        cards += [("optimizer steps", f"{steps[-1]:,}", False), ("last training loss", f"{losses[-1]:.3f}", False)]
    _, lengths = series(records.evaluations, "simulated_acceptance_length")
    if lengths:
        cards.append(("simulated τ, held out", f"{lengths[-1]:.2f}", False))
    bench = records.bench
    if bench is not None:
        cards.append(("τ, measured", _shown(bench["acceptance_length"], 2), False))
        cards.append(("speed against plain", f"{_shown(bench['speedup']['decode'], 2)}×", False))
        lossless = bool(bench["lossless"])
        cards.append(("output identical", "yes" if lossless else "NO", not lossless))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card{" bad" if bad else ""}"><b>{as_text(value)}</b><span>{as_text(label)}</span></div>'
            for label, value, bad in cards
        )
        + "</div>"
    )


def _render_bench(bench: Mapping[str, Any] | None) -> str:
    if bench is None:
        return '<p class="muted">This run was not benched. <code>specforge bench</code> does it.</p>'
    speeds, ratios = bench["tokens_per_second"], bench["speedup"]
    rows = [
        (label, _shown(speeds["plain"][key], 1), _shown(speeds["speculative"][key], 1), f"{_shown(ratios[key], 2)}×")
        for label, key in (("tokens/s, decode", "decode"), ("tokens/s, prefill included", "with_prefill"))
    ]
    rows.append(("acceptance length τ", "1.00", _shown(bench["acceptance_length"], 2), ""))
    rows.append(("acceptance rate", "", _shown(bench["acceptance_rate"], 3), ""))
    facts = ", ".join(f"{name} {value}" for name, value in bench["facts"].items())
    counted = (
        f"{bench['prompts']} prompts, {bench['new_tokens']:,} tokens, "
        f"{bench['draft_tokens']} draft tokens per target pass."
    )
    identical = (
        "Output was identical to plain decoding, token by token."
        if bench["lossless"]
        else "<strong>Output DIFFERED from plain decoding: this draft or target cannot be trusted.</strong>"
    )
    return (
        _render_table(("measured", "plain", "speculative", "ratio"), rows) + f"<p>{identical} {as_text(counted)}</p>"
        f'<p class="muted">{as_text(facts)}</p>'
    )


def _render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if index else ''}>{as_text(value)}</{tag}>" for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _render_file(title: str, content: str) -> str:
    return f"<details><summary>{as_text(title)}</summary><pre>{as_text(content)}</pre></details>"


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
