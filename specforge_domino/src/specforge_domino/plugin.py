# SPDX-License-Identifier: Apache-2.0
"""What the Domino distribution offers, as a descriptor. Light: imports neither torch nor transformers."""

from __future__ import annotations

from specforge_core import StrategySpec, hookimpl

from specforge_domino.config import DominoConfig


@hookimpl
def specforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="domino",
            config=DominoConfig,
            factory="specforge_domino.strategy:DominoStrategy",
            summary="Domino: a block-parallel draft with a causal correction head (arXiv 2605.29707)",
            export_formats=("sglang",),
            golden="specforge_domino.golden:run_golden",
            demo="specforge_domino:recipes/demo.yaml",
        )
    ]
