# SPDX-License-Identifier: Apache-2.0
"""Building blocks that strategies share: frozen target weights, vocabulary map, norm, RoPE, attention, SwiGLU."""

from specforge_core.modeling.attention import QueryLayout, attend, attend_plain, causal_padding_mask
from specforge_core.modeling.frozen import FrozenEmbedding, FrozenHead
from specforge_core.modeling.fused_attention import Attended, fused_attention, fused_attention_backward, per_query_head
from specforge_core.modeling.gated import gated_mlp
from specforge_core.modeling.norm import RMSNorm, rms_norm, rms_norm_linear
from specforge_core.modeling.rotary import RotaryEmbedding, rotate
from specforge_core.modeling.vocab_map import VocabMap

__all__ = [
    "Attended",
    "FrozenEmbedding",
    "FrozenHead",
    "QueryLayout",
    "RMSNorm",
    "RotaryEmbedding",
    "VocabMap",
    "attend",
    "attend_plain",
    "causal_padding_mask",
    "fused_attention",
    "fused_attention_backward",
    "gated_mlp",
    "per_query_head",
    "rms_norm",
    "rms_norm_linear",
    "rotate",
]
