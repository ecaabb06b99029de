# SPDX-License-Identifier: Apache-2.0
"""EAGLE3's section of the run file, and the draft's shape that follows from it and the target.

Read by ``specforge plan``: no torch here. The shape also travels in the export's ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from specforge_core import OptimizerDefaults, StrategyConfig
from specforge_core.contracts import CaptureRequest, ConfigError, Norm, TargetInfo

RopeParameters = Mapping[str, "float | int | str | Sequence[float]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Everything that fixes an EAGLE3 draft's tensors and arithmetic.

    :param target_hidden_size: of the captured features; usually equal to ``hidden_size``.
    :param num_aux: captured layers that ``fc`` joins.
    :param norm_output: a norm stands before the head (the state fed to the next step never passes it).
    :param last_hidden_norm: what the target's last hidden states have been through when they arrive.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    num_aux: int = 3
    fc_norm: bool = False
    norm_output: bool = True
    last_hidden_norm: Norm = "post"


class Eagle3Config(StrategyConfig):
    """EAGLE-3: a one-layer draft, unrolled in training as it will be in decoding."""

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults(
        learning_rate=1e-4, warmup_ratio=0.015, max_grad_norm=0.5
    )

    name: str = "eagle3"
    ttt_steps: int = Field(7, ge=1, le=64, description="unroll steps in training; draft positions that are evaluated")
    draft_vocab_size: int | None = Field(None, ge=1, description="most frequent trained tokens; default: all tokens")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, min_length=1, description="decoder layers whose output is captured; default: low, middle and high"
    )
    last_hidden_norm: Norm = Field("post", description="capture the last state after (post) or before the final norm")
    feature_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="element type of captured features; default: the target's"
    )
    intermediate_size: int | None = Field(None, ge=1, description="default: the target's")
    num_attention_heads: int | None = Field(None, ge=1, description="default: the target's")
    num_key_value_heads: int | None = Field(None, ge=1, description="default: the target's, or all heads if set")
    fc_norm: bool = Field(False, description="normalise each captured layer before they are joined (EAGLE-3.1)")
    norm_output: bool = Field(True, description="normalise before the draft's head")
    lk_loss_type: Literal["none", "alpha", "lambda"] = Field("none", description="none: KL divergence alone")
    kl_scale: float = Field(1.0, ge=0, description="lambda: weight of the KL term where nothing is accepted yet")
    kl_decay: float = Field(3.0, ge=0, description="lambda: how fast that weight falls as acceptance rises")
    loss_normalizer: Literal["tokens", "positions"] = Field(
        "tokens", description="divide by trained tokens, or by all positions of the window"
    )
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of each unroll step relative to the one before")
    max_draft_tokens: int | None = Field(None, ge=1, description="proposed per target pass; default: ttt_steps")

    @property
    def num_draft_tokens(self) -> int:
        """How many tokens are proposed per target pass at most."""
        return self.max_draft_tokens or self.ttt_steps

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return CaptureRequest(
            aux_layer_ids=self.aux_layers(info),
            last_hidden_norm=self.last_hidden_norm,
            dtype=self.feature_dtype or info.dtype,
        )

    def aux_layers(self, info: TargetInfo) -> tuple[int, ...]:
        """The captured layers: as configured, else [1, L//2 − 1, L − 4], else (few layers) first, middle, last.

        :raises ConfigError: a layer that this target does not have, or one named twice.
        """
        layers, count = self.aux_layer_ids, info.num_layers
        where = "strategy.aux_layer_ids"
        if layers is None:
            layers = (1, count // 2 - 1, count - 4)
            if not 1 < layers[1] < layers[2]:  # fewer than eight layers: the default would repeat or reverse
                layers = tuple(sorted({0, count // 2, count - 1}))
            return layers
        outside = [layer for layer in layers if not 0 <= layer < count]
        if outside:
            raise ConfigError(
                f"layer {outside[0]} does not exist: the target has layers 0 to {count - 1}",
                where=where,
                hint="layers are zero-based decoder layers whose output is captured",
            )
        if len(set(layers)) != len(layers):
            raise ConfigError(f"a layer is named twice in {list(layers)}", where=where)
        return layers

    def check(self, info: TargetInfo) -> list[str]:
        problems = []
        if self.draft_vocab_size is not None and self.draft_vocab_size > info.vocab_size:
            problems.append(
                f"strategy.draft_vocab_size is {self.draft_vocab_size}, the target's vocabulary is {info.vocab_size}: "
                "set a smaller one, or leave it out to draft over all tokens"
            )
        heads, kv_heads = self._heads(info)
        if heads % kv_heads:
            problems.append(
                f"strategy.num_key_value_heads ({kv_heads}) does not divide num_attention_heads ({heads}): "
                "set one that does"
            )
        if self.num_attention_heads is not None and info.hidden_size % (2 * self.num_attention_heads):
            problems.append(
                f"strategy.num_attention_heads is {heads}, which does not cut the hidden size {info.hidden_size} "
                "into heads of even size: set one that does"
            )
        kind = info.rope_parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            problems.append(f"the target's RoPE type {kind!r} is not implemented for drafts: use another target")
        return problems

    def _heads(self, info: TargetInfo) -> tuple[int, int]:
        if self.num_attention_heads is None:
            return info.num_attention_heads, self.num_key_value_heads or info.num_key_value_heads
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads

    def shape(self, info: TargetInfo) -> DraftShape:
        """The draft for this target. Its hidden size is the target's, whose embedding it shares.

        :raises ConfigError: settings that do not fit the target.
        """
        problems = self.check(info)
        if problems:
            raise ConfigError(problems[0])
        heads, kv_heads = self._heads(info)
        own_heads = self.num_attention_heads is not None
        return DraftShape(
            vocab_size=info.vocab_size,
            draft_vocab_size=self.draft_vocab_size or info.vocab_size,
            hidden_size=info.hidden_size,
            target_hidden_size=info.hidden_size,
            intermediate_size=self.intermediate_size or info.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=info.hidden_size // heads if own_heads else info.head_dim,
            rms_norm_eps=info.rms_norm_eps,
            rope_parameters=dict(info.rope_parameters),
            num_aux=len(self.aux_layers(info)),
            fc_norm=self.fc_norm,
            norm_output=self.norm_output,
            last_hidden_norm=self.last_hidden_norm,
        )
