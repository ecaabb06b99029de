# SPDX-License-Identifier: Apache-2.0
"""The tiny target as a plugin module: section, descriptor and hook. Imports no torch, like any plugin module.

It is registered nowhere. A test that wants it in a run registers this module with a plugin manager.
"""

from __future__ import annotations

from pydantic import Field

from specforge_core.contracts import EngineCapabilities, TargetInfo
from specforge_core.hooks.descriptors import TargetEngineSpec
from specforge_core.hooks.sections import TargetEngineConfig
from specforge_core.hooks.specs import hookimpl

NUM_BYTES = 256
BOS, TURN_START, TURN_END = 256, 257, 258


class TinyTargetConfig(TargetEngineConfig):
    """A random target of a few thousand parameters; its seed is its weights."""

    name: str = "tiny"
    seed: int = Field(0, ge=0)
    num_layers: int = Field(8, ge=1)
    hidden_size: int = Field(32, ge=4, multiple_of=4)
    vocab_size: int = Field(264, ge=TURN_END + 1, description="bytes, three special tokens and unused rows")

    def describe(self) -> TargetInfo:
        return TargetInfo(
            name_or_path=f"tiny-{self.seed}",
            architecture="TinyTarget",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            dtype="float32",
            intermediate_size=2 * self.hidden_size,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=self.hidden_size // 4,
            rms_norm_eps=1e-6,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=BOS,
            eos_token_ids=(TURN_END,),
        )


@hookimpl
def specforge_target_engines() -> list[TargetEngineSpec]:
    return [
        TargetEngineSpec(
            name="tiny",
            config=TinyTargetConfig,
            factory="specforge_core.testing.tiny_target:TinyTarget",
            tokenizer="specforge_core.testing.tiny_tokenizer:load_tokenizer",
            capabilities=EngineCapabilities(decodes=True),
            summary="a random target of a few thousand parameters, for tests",
        )
    ]
