# SPDX-License-Identifier: Apache-2.0
"""What the EAGLE3 distribution offers, as a descriptor. Light: imports neither torch nor transformers."""

from __future__ import annotations

from specforge_core import StrategySpec, hookimpl

from specforge_eagle3.config import Eagle3Config


@hookimpl
def specforge_strategies() -> list[StrategySpec]:
    return [
        StrategySpec(
            name="eagle3",
            config=Eagle3Config,
            factory="specforge_eagle3.strategy:Eagle3Strategy",
            summary="EAGLE-3: one-layer chain draft on low, middle and high features (arXiv 2503.01840)",
            export_formats=("sglang", "speculators"),
            golden="specforge_eagle3.golden:run_golden",
            demo="specforge_eagle3:recipes/demo.yaml",
        )
    ]
