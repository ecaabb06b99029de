# SPDX-License-Identifier: Apache-2.0
"""A target that is nothing but random numbers: frozen weights, token counts and features of tiny shapes.

Enough to train and decode any strategy for a few steps without a model; where real logits matter, use the tiny target.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    FINAL_NORM,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LM_HEAD,
    LOSS_MASK,
    CaptureRequest,
    Sample,
    TargetInfo,
)

TINY_INFO = TargetInfo(
    name_or_path="synthetic",
    architecture="LlamaForCausalLM",
    num_layers=12,
    hidden_size=32,
    vocab_size=67,
    dtype="float32",
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    bos_token_id=0,
    eos_token_ids=(1,),
)


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(parts).encode()))


class SyntheticTarget:
    """A FrozenSource over random weights, and samples to train on. The same arguments give the same bits."""

    def __init__(self, info: TargetInfo = TINY_INFO, *, seed: int = 0) -> None:
        self._info = info
        self._seed = seed

    @property
    def info(self) -> TargetInfo:
        return self._info

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        vocab, hidden = self._info.vocab_size, self._info.hidden_size
        shapes = {EMBED_TOKENS: (vocab, hidden), LM_HEAD: (vocab, hidden), FINAL_NORM: (hidden,)}
        return {name: torch.randn(shapes[name], generator=_generator(self._seed, name)) for name in names}

    def token_counts(self) -> Tensor:
        return torch.randint(0, 50, (self._info.vocab_size,), generator=_generator(self._seed, "counts"))

    def sample(self, prompt_id: str, *, num_tokens: int, request: CaptureRequest, trained: bool = True) -> Sample:
        """Random features of one prompt: its second half is trained, or nothing is."""
        generator, hidden = _generator(self._seed, prompt_id), self._info.hidden_size
        dtype = getattr(torch, request.dtype)
        mask = torch.zeros(num_tokens, dtype=torch.bool)
        mask[num_tokens // 2 :] = trained
        features = {
            INPUT_IDS: torch.randint(0, self._info.vocab_size, (num_tokens,), generator=generator),
            LOSS_MASK: mask,
        }
        if request.aux_layer_ids:
            shape = (num_tokens, len(request.aux_layer_ids), hidden)
            features[AUX_HIDDEN_STATES] = torch.randn(shape, generator=generator).to(dtype)
        if request.last_hidden_norm is not None:
            features[LAST_HIDDEN_STATES] = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
        return Sample(prompt_id, 0, features, last_hidden_norm=request.last_hidden_norm)
