# SPDX-License-Identifier: Apache-2.0
"""A complete target engine in one page of torch: for tests, and as the example an engine's author can read.

Its weights come from a seed. A layer is causal attention of one head, with a distance penalty in place of positions,
and an MLP; the cache of a layer is simply what entered it.

Shapes: B batch, T tokens, n new tokens, C tokens in the cache and new ones, L captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
    Prompt,
    Sample,
    TargetDecoder,
    TargetEngine,
    TargetError,
    TargetInfo,
    TargetStep,
)
from specforge_core.testing.tiny_plugin import TinyTargetConfig

_FROZEN = (EMBED_TOKENS, FINAL_NORM, LM_HEAD)


class TinyTarget(TargetEngine):
    """Deterministic, decodes, and needs no file."""

    def __init__(self, config: TinyTargetConfig | None = None):
        self._info = (config or TinyTargetConfig()).describe()
        self._weights = _make_weights(self._info, seed=(config or TinyTargetConfig()).seed)

    @property
    def info(self) -> TargetInfo:
        return self._info

    @torch.no_grad()
    def capture(self, prompts: Sequence[Prompt], request: CaptureRequest, epoch: int) -> Iterator[Sample]:
        self._check(request)
        if not prompts:
            return iter(())
        longest = max(prompt.num_tokens for prompt in prompts)
        input_ids_BT = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids_BT[row, : prompt.num_tokens] = torch.tensor(prompt.input_ids)
        picked = self.pick(*self.forward(input_ids_BT, []), request)
        return iter([_cut_sample(prompt, row, picked, request, epoch) for row, prompt in enumerate(prompts)])

    def frozen_weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        if unknown := [name for name in names if name not in _FROZEN]:
            raise TargetError(
                f"there is no weight {unknown[0]!r}", where=self._info.name_or_path, hint=", ".join(_FROZEN)
            )
        return {name: self._weights[name].clone() for name in names}

    def decoder(self, request: CaptureRequest) -> TargetDecoder:
        self._check(request)
        return TinyDecoder(self, request)

    def health(self) -> None:
        pass

    def close(self) -> None:
        pass

    def forward(self, input_ids_BT: Tensor, cache: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Every layer's output for the new tokens, and the last one after the final norm.

        :param cache: what entered each layer so far, [B, C, H] each; extended in place. Empty: begin.
        """
        hidden_BTH = self._weights[EMBED_TOKENS][input_ids_BT]
        outputs = []
        for layer in range(self._info.num_layers):
            if len(cache) <= layer:
                cache.append(hidden_BTH)
            else:
                cache[layer] = torch.cat([cache[layer], hidden_BTH], dim=1)
            hidden_BTH = self._layer(layer, hidden_BTH, cache[layer])
            outputs.append(hidden_BTH)
        return outputs, self._norm(hidden_BTH) * self._weights[FINAL_NORM]

    def pick(self, outputs: list[Tensor], last_BTH: Tensor, request: CaptureRequest) -> dict[str, Tensor]:
        """The features that ``request`` asks for, batched: [B, T, …]."""
        features = {}
        if request.aux_layer_ids:
            features[AUX_HIDDEN_STATES] = torch.stack([outputs[layer] for layer in request.aux_layer_ids], dim=2)
        if request.last_hidden_norm is not None:
            features[LAST_HIDDEN_STATES] = last_BTH if request.last_hidden_norm == "post" else outputs[-1]
        return {name: tensor.to(getattr(torch, request.dtype)) for name, tensor in features.items()}

    def logits(self, last_nH: Tensor) -> Tensor:
        return last_nH @ self._weights[LM_HEAD].T

    def _layer(self, layer: int, hidden_BTH: Tensor, seen_BCH: Tensor) -> Tensor:
        mix, up, down = (self._weights[f"{layer}.{name}"] for name in ("mix", "up", "down"))
        query_BTH, key_BCH = self._norm(hidden_BTH), self._norm(seen_BCH)
        new, total = hidden_BTH.shape[1], seen_BCH.shape[1]
        distance_TC = torch.arange(total - new, total)[:, None] - torch.arange(total)[None, :]
        bias_TC = torch.where(distance_TC >= 0, -0.25 * distance_TC, float("-inf"))
        scores_BTC = query_BTH @ mix @ key_BCH.transpose(1, 2) / hidden_BTH.shape[-1] ** 0.5 + bias_TC
        hidden_BTH = hidden_BTH + torch.softmax(scores_BTC, dim=-1) @ key_BCH
        return hidden_BTH + torch.tanh(self._norm(hidden_BTH) @ up) @ down

    def _norm(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._info.rms_norm_eps)

    def _check(self, request: CaptureRequest) -> None:
        for layer in request.aux_layer_ids:
            if not 0 <= layer < self._info.num_layers:
                raise TargetError(
                    f"layer {layer} was asked for, but the layers are 0 to {self._info.num_layers - 1}",
                    where=self._info.name_or_path,
                    hint="correct the strategy's aux_layer_ids",
                )


def _cut_sample(prompt: Prompt, row: int, picked: Mapping[str, Tensor], request: CaptureRequest, epoch: int) -> Sample:
    """One prompt's rows of the batch, in memory of their own."""
    features = {name: batch[row, : prompt.num_tokens].clone() for name, batch in picked.items()}
    features[INPUT_IDS] = torch.tensor(prompt.input_ids, dtype=torch.int64)
    features[LOSS_MASK] = torch.tensor(prompt.loss_mask, dtype=torch.bool)
    return Sample(prompt.prompt_id, epoch, features, request.last_hidden_norm)


class TinyDecoder(TargetDecoder):
    """One sequence's cache."""

    def __init__(self, target: TinyTarget, request: CaptureRequest):
        self._target = target
        self._request = request
        self._cache: list[Tensor] = []

    @torch.no_grad()
    def forward(self, token_ids: Tensor) -> TargetStep:
        outputs, last_BTH = self._target.forward(token_ids[None], self._cache)
        features = {name: t[0].clone() for name, t in self._target.pick(outputs, last_BTH, self._request).items()}
        return TargetStep(self._target.logits(last_BTH[0]), features)

    def truncate(self, length: int) -> None:
        held = self._cache[0].shape[1] if self._cache else 0
        if not 0 <= length <= held:
            raise ValueError(f"cannot truncate {held} tokens to {length}")
        self._cache = [seen_BCH[:, :length] for seen_BCH in self._cache]


def _make_weights(info: TargetInfo, *, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    hidden, inner = info.hidden_size, info.intermediate_size
    weights = {
        EMBED_TOKENS: random(info.vocab_size, hidden),
        FINAL_NORM: 1 + random(hidden, scale=0.1),
        LM_HEAD: random(info.vocab_size, hidden, scale=hidden**-0.5),
    }
    for layer in range(info.num_layers):
        weights[f"{layer}.mix"] = random(hidden, hidden, scale=hidden**-0.5)
        weights[f"{layer}.up"] = random(hidden, inner, scale=hidden**-0.5)
        weights[f"{layer}.down"] = random(inner, hidden, scale=inner**-0.5)
    return weights
