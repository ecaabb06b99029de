# SPDX-License-Identifier: Apache-2.0
"""What this distribution offers to SpecForge: the ``hf`` target engine. Imports neither torch nor transformers."""

from __future__ import annotations

from specforge_core import TargetEngineSpec, hookimpl
from specforge_core.contracts import EngineCapabilities

from specforge_hf_target.config import HfTargetConfig


@hookimpl
def specforge_target_engines() -> list[TargetEngineSpec]:
    return [
        TargetEngineSpec(
            name="hf",
            config=HfTargetConfig,
            factory="specforge_hf_target.engine:HfTargetEngine",
            tokenizer="specforge_hf_target.tokenizer:load_tokenizer",
            capabilities=EngineCapabilities(decodes=True),
            demo="specforge_hf_target.demo_target:prepare_demo",
            summary="any causal language model that transformers loads, in this process, on CPU or GPU",
        )
    ]
