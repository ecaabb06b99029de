# SPDX-License-Identifier: Apache-2.0
"""DFlash's section of the run file, and the draft's shape that follows from it and the target.

Read by ``specforge plan``: no torch here. The shape also travels in the export's ``config.json``. What every
block-parallel draft shares is :class:`BlockDraftConfig`; a strategy that builds on DFlash subclasses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from specforge_core import OptimizerDefaults, StrategyConfig
from specforge_core.contracts import CaptureRequest, ConfigError, TargetInfo

RopeParameters = Mapping[str, "float | int | str | Sequence[float]"]
LayerType = Literal["full_attention", "sliding_attention"]
MAX_BLOCK_SIZE = 256
"""The largest block that is trained and believed of an export: servers verify 16 tokens; a block costs its square."""
LossType = Literal["dflash", "dpace", "dpace-cumulative-confidence-only", "dpace-continuation-value-only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftShape:
    """Everything that fixes a block-parallel draft's tensors and arithmetic.

    :param target_hidden_size: of the captured features; usually equal to ``hidden_size``.
    :param num_aux: captured layers that ``fc`` joins.
    :param block_size: slots of a block, the anchor's included.
    :param layer_types: one per draft layer.
    :param sliding_window: of the sliding layers.
    """

    vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    num_aux: int
    block_size: int
    mask_token_id: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = None

    def window(self, layer: int) -> int | None:
        """The attention window of a draft layer; None where it sees everything before the anchor."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None


def default_aux_layers(num_target_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """Captured layers of an n-layer draft: [L//2] for n = 1, else ``round(1 + i·(L−4)/(n−1))``, half to even."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    span, steps = num_target_layers - 4, num_draft_layers - 1
    return tuple(round(1 + i * span / steps) for i in range(num_draft_layers))  # Python rounds half to even


class BlockDraftConfig(StrategyConfig):
    """What every draft that fills a block at once is configured with."""

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults(
        learning_rate=6e-4, warmup_ratio=0.04, max_grad_norm=1.0
    )

    block_size: int = Field(16, ge=2, le=MAX_BLOCK_SIZE, description="slots of a block, the anchor's included")
    num_anchors: int = Field(512, ge=1, description="blocks trained per sample at most, at random places")
    num_layers: int = Field(5, ge=1, description="layers of the draft")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, min_length=1, description="decoder layers whose output is captured; default: spread evenly, one per layer"
    )
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="token that stands for what is to be guessed; default: the last embedding row that is neither "
        "bos nor eos (unused where the target pads its embedding)",
    )
    layer_types: tuple[LayerType, ...] | None = Field(
        None, min_length=1, description="attention of each draft layer; default: full, or sliding with sliding_window"
    )
    sliding_window: int | None = Field(None, ge=1, description="positions a sliding layer sees, its own included")
    loss_decay_gamma: float | None = Field(
        None, gt=0, description="later slots weigh less, by a factor e every so many; default: all weigh the same"
    )
    feature_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="element type of captured features; default: the target's"
    )
    intermediate_size: int | None = Field(None, ge=1, description="default: the target's")
    num_attention_heads: int | None = Field(None, ge=1, description="default: the target's")
    num_key_value_heads: int | None = Field(None, ge=1, description="default: the target's, or all heads if set")
    max_draft_tokens: int | None = Field(None, ge=1, description="proposed per target pass; default: block_size - 1")

    @property
    def label_offset(self) -> int:
        """0: a slot guesses the token at its own position; 1: the one after it."""
        return 0

    @property
    def num_draft_tokens(self) -> int:
        """How many tokens are proposed at most. Servers verify ``block_size`` tokens, the bonus token included."""
        return min(self.max_draft_tokens or self.block_size - 1, self.block_size - 1 + self.label_offset)

    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        return CaptureRequest(aux_layer_ids=self.aux_layers(info), dtype=self.feature_dtype or info.dtype)

    def aux_layers(self, info: TargetInfo) -> tuple[int, ...]:
        """The captured layers: as configured, else :func:`default_aux_layers`.

        :raises ConfigError: a layer that this target does not have, or one named twice.
        """
        layers, count = self.aux_layer_ids, info.num_layers
        where = "strategy.aux_layer_ids"
        if layers is None:
            layers = default_aux_layers(count, self.num_layers)
            if len(set(layers)) != len(layers) or not all(0 <= layer < count for layer in layers):
                raise ConfigError(
                    f"a target of {count} layers has no default layers for a draft of {self.num_layers}",
                    where=where,
                    hint=f"name the captured layers (0 to {count - 1}), or set fewer strategy.num_layers",
                )
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

    def mask_token(self, info: TargetInfo) -> int:
        """The mask token: as configured, else the last embedding row that is neither bos nor eos."""
        if self.mask_token_id is not None:
            return self.mask_token_id
        special = {info.bos_token_id, *info.eos_token_ids}
        return next(row for row in range(info.vocab_size - 1, -1, -1) if row not in special)

    def check(self, info: TargetInfo) -> list[str]:
        problems = []
        if self.mask_token_id is not None and self.mask_token_id >= info.vocab_size:
            problems.append(
                f"strategy.mask_token_id is {self.mask_token_id}, the target's embedding has {info.vocab_size} rows: "
                "name one of them"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            problems.append(
                f"strategy.layer_types names {len(self.layer_types)} layers, num_layers is {self.num_layers}: "
                "name as many"
            )
        if "sliding_attention" in (self.layer_types or ()) and self.sliding_window is None:
            problems.append("strategy.layer_types has sliding layers: set strategy.sliding_window")
        problems += self._check_heads(info)
        kind = info.rope_parameters.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            problems.append(f"the target's RoPE type {kind!r} is not implemented for drafts: use another target")
        return problems

    def _check_heads(self, info: TargetInfo) -> list[str]:
        problems = []
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
        return problems

    def _heads(self, info: TargetInfo) -> tuple[int, int]:
        if self.num_attention_heads is None:
            return info.num_attention_heads, self.num_key_value_heads or info.num_key_value_heads
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads

    def _layer_types(self) -> tuple[LayerType, ...]:
        everywhere: LayerType = "full_attention" if self.sliding_window is None else "sliding_attention"
        return self.layer_types or (everywhere,) * self.num_layers

    def shape(self, info: TargetInfo) -> DraftShape:
        """The draft for this target. Its hidden size is the target's, whose embedding and head it shares.

        :raises ConfigError: settings that do not fit the target.
        """
        problems = self.check(info)
        if problems:
            raise ConfigError(problems[0])
        heads, kv_heads = self._heads(info)
        own_heads = self.num_attention_heads is not None
        return DraftShape(
            vocab_size=info.vocab_size,
            hidden_size=info.hidden_size,
            target_hidden_size=info.hidden_size,
            intermediate_size=self.intermediate_size or info.intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=info.hidden_size // heads if own_heads else info.head_dim,
            rms_norm_eps=info.rms_norm_eps,
            rope_parameters=dict(info.rope_parameters),
            num_aux=len(self.aux_layers(info)),
            block_size=self.block_size,
            mask_token_id=self.mask_token(info),
            layer_types=self._layer_types(),
            sliding_window=self.sliding_window,
        )


class DflashConfig(BlockDraftConfig):
    """DFlash: a draft that fills a whole block in one pass, conditioned on the target's features."""

    name: str = "dflash"
    loss_type: LossType = Field("dflash", description="dflash: cross-entropy; dpace…: weighted by acceptance")
    dpace_alpha: float = Field(0.5, ge=0, le=1, description="D-PACE: 0 trusts the draft's confidence, 1 ignores it")
