# SPDX-License-Identifier: Apache-2.0
"""What a bench measured, as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from specforge_core.decoding.bench_result import BenchResult


def bench_table(result: BenchResult) -> Table:
    """Plain and speculative decoding side by side, and how many guesses were accepted at each position."""
    from rich.table import Table

    table = Table(title=f"bench: {len(result.outcomes)} prompts, {result.draft_tokens} draft tokens per pass")
    table.add_column("measured")
    table.add_column("plain", justify="right")
    table.add_column("speculative", justify="right")
    table.add_column("ratio", justify="right")
    for label, with_prefill in (("tokens/s, decode", False), ("tokens/s, prefill included", True)):
        plain = result.tokens_per_second("plain", with_prefill=with_prefill)
        speculative = result.tokens_per_second("speculative", with_prefill=with_prefill)
        ratio = result.speedup(with_prefill=with_prefill)
        table.add_row(label, _shown(plain, 1), _shown(speculative, 1), f"{_shown(ratio, 2)}×")
    table.add_row("target passes", str(result.plain_passes), str(result.target_passes), "")
    table.add_row("acceptance length τ", "1.00", _shown(result.acceptance_length, 2), "")
    table.add_row("acceptance rate", "", _shown(result.acceptance_rate, 3), "")
    for position, accepted in enumerate(result.position_acceptance, start=1):
        table.add_row(f"accepted at position {position}", "", _shown(accepted.value, 3), "")
    table.add_section()
    table.add_row("output identical", "", "yes" if result.lossless else "NO", "")
    return table


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
