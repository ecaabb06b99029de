# SPDX-License-Identifier: Apache-2.0
"""What the DFlash distribution offers, as a descriptor. Light: imports neither torch nor transformers."""

from __future__ import annotations

from specforge_core import StrategySpec, hookimpl

from specforge_dflash.config import DflashConfig


@hookimpl
def specforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="dflash",
            config=DflashConfig,
            factory="specforge_dflash.strategy:DflashStrategy",
            summary="DFlash: block-parallel draft over target features, cross-entropy or D-PACE (arXiv 2602.06036)",
            export_formats=("sglang", "speculators"),
            golden="specforge_dflash.golden:run_golden",
            demo="specforge_dflash:recipes/demo.yaml",
        )
    ]
