# SPDX-License-Identifier: Apache-2.0
"""One sequence's key-value cache over a transformers model, for real decoding.

Shapes: n new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from specforge_core.contracts import CaptureRequest, TargetDecoder, TargetError, TargetInfo, TargetStep
from torch import Tensor

from specforge_hf_target.decoder_layers import FeatureCollector, find_decoder, find_layers
from specforge_hf_target.model_files import running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REWINDABLE = {"full_attention", "sliding_attention", "chunked_attention"}


class HfTargetDecoder(TargetDecoder):
    """Appends tokens to a cache and can forget the last ones again."""

    def __init__(self, model: PreTrainedModel, request: CaptureRequest, info: TargetInfo):
        from transformers import DynamicCache

        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        if not kinds <= _REWINDABLE:
            raise TargetError(
                f"{info.architecture} keeps a state that cannot be rewound ({', '.join(sorted(kinds - _REWINDABLE))})",
                where=f"target {info.name_or_path}",
                hint="features can be captured, but speculative decoding must be measured in a server",
            )
        decoder = find_decoder(model, info)
        self._model, self._info = model, info
        self._device = next(model.parameters()).device
        self._collector = FeatureCollector(decoder, find_layers(decoder, info), request, info)
        # Made without the model's configuration, every layer's cache keeps all positions, sliding windows included:
        # the mask still cuts the window, and rewinding is always possible.
        self._cache = DynamicCache()

    def forward(self, token_ids: Tensor) -> TargetStep:
        with running(self._info), torch.no_grad(), self._collector.attached():
            output = self._model(
                input_ids=token_ids.to(self._device)[None], past_key_values=self._cache, use_cache=True
            )
        logits_nV = output.logits[0].to("cpu", torch.float32)
        return TargetStep(logits_nV, self._collector.rows(0, token_ids.shape[0]))

    def truncate(self, length: int) -> None:
        surplus = self._cache.get_seq_length() - length
        if surplus < 0 or length < 0:
            raise ValueError(f"cannot truncate {self._cache.get_seq_length()} tokens to {length}")
        if surplus:
            self._cache.crop(-surplus)
