# SPDX-License-Identifier: Apache-2.0
"""Where a transformers model keeps its decoder layers, and the hooks that collect what they put out.

Shapes: B batch, T tokens, L captured layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from specforge_core.contracts import AUX_HIDDEN_STATES, LAST_HIDDEN_STATES, CaptureRequest, TargetError, TargetInfo
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_decoder(model: PreTrainedModel, info: TargetInfo) -> nn.Module:
    """The part of a causal language model that turns token ids into hidden states: final norm included, head not.

    :raises TargetError: the model has no such part.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TargetError(
            f"{info.architecture} has no language-model head",
            where=f"target {info.name_or_path}",
            hint="only causal language models can be targets",
        )
    decoder: nn.Module = model.get_decoder()
    if decoder is model or any(module is head for module in decoder.modules()):
        decoder = model.base_model
    if decoder is model or any(module is head for module in decoder.modules()):
        raise _unknown(info, "its decoder cannot be told from its head")
    return decoder


def find_layers(decoder: nn.Module, info: TargetInfo) -> nn.ModuleList:
    """The decoder's one list of ``info.num_layers`` layers, the outermost if lists are nested.

    :raises TargetError: there is no such list, or more than one.
    """
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == info.num_layers
    ]
    outermost = min((depth for depth, _ in lists), default=0)
    found = [module for depth, module in lists if depth == outermost]
    if len(found) != 1:
        raise _unknown(info, f"{len(found)} lists of {info.num_layers} decoder layers were found")
    return found[0]


def _unknown(info: TargetInfo, reason: str) -> TargetError:
    return TargetError(
        f"{info.architecture} is not understood: {reason}",
        where=f"target {info.name_or_path}",
        hint="capture from it needs an engine plugin of its own",
    )


def check_request(request: CaptureRequest, info: TargetInfo) -> None:
    """:raises TargetError: a layer that the target does not have, or an unknown dtype."""
    for layer in request.aux_layer_ids:
        if not 0 <= layer < info.num_layers:
            raise TargetError(
                f"layer {layer} was asked for, but the layers are 0 to {info.num_layers - 1}",
                where=f"target {info.name_or_path}",
                hint="correct the strategy's aux_layer_ids",
            )
    if request.dtype not in ("float32", "bfloat16", "float16"):
        raise TargetError(f"hidden states cannot be captured as {request.dtype}", hint="use float32 or bfloat16")


class FeatureCollector:
    """Copies what a forward pass makes, while it makes it.

    Layers' outputs are copied in their hooks, because a later layer may reuse the memory. ``pre`` is the output of the
    last layer, ``post`` the output of the decoder.
    """

    def __init__(self, decoder: nn.Module, layers: Iterable[nn.Module], request: CaptureRequest, info: TargetInfo):
        self._decoder, self._layers, self._request, self._info = decoder, list(layers), request, info
        self._dtype: torch.dtype = getattr(torch, request.dtype)
        self._aux_BTLH: Tensor | None = None
        self._last_BTH: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks stay on the model inside this context only, also when the pass fails."""
        self._aux_BTLH = self._last_BTH = None
        handles = []
        try:
            for layer in set(self._request.aux_layer_ids):
                slots = [slot for slot, wanted in enumerate(self._request.aux_layer_ids) if wanted == layer]
                handles.append(self._layers[layer].register_forward_hook(self._aux_hook(slots)))
            if self._request.last_hidden_norm == "pre":
                handles.append(self._layers[-1].register_forward_hook(self._last_hook))
            elif self._request.last_hidden_norm == "post":
                handles.append(self._decoder.register_forward_hook(self._last_hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, row: int, num_tokens: int) -> dict[str, Tensor]:
        """The features of one sequence's first ``num_tokens`` positions, as CPU tensors of their own."""
        features = {}
        if self._request.aux_layer_ids:
            features[AUX_HIDDEN_STATES] = self._own(self._aux_BTLH, row, num_tokens, "aux hidden states")
        if self._request.last_hidden_norm is not None:
            features[LAST_HIDDEN_STATES] = self._own(self._last_BTH, row, num_tokens, "last hidden states")
        return features

    def _own(self, batch: Tensor | None, row: int, num_tokens: int, what: str) -> Tensor:
        if batch is None:
            raise _unknown(self._info, f"its forward pass gave no {what}")
        return batch[row, :num_tokens].to("cpu", copy=True).contiguous()

    def _aux_hook(self, slots: list[int]) -> Callable[[nn.Module, object, Any], None]:
        def copy(module: nn.Module, args: object, output: Any) -> None:
            hidden_BTH = self._hidden(output)
            if self._aux_BTLH is None:
                batch, tokens, hidden = hidden_BTH.shape
                shape = (batch, tokens, len(self._request.aux_layer_ids), hidden)
                self._aux_BTLH = torch.empty(shape, dtype=self._dtype, device=hidden_BTH.device)
            for slot in slots:
                self._aux_BTLH[:, :, slot] = hidden_BTH

        return copy

    def _last_hook(self, module: nn.Module, args: object, output: Any) -> None:
        self._last_BTH = self._hidden(output).to(self._dtype, copy=True)

    def _hidden(self, output: Any) -> Tensor:
        hidden = output if isinstance(output, Tensor) else output[0]
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self._info.hidden_size:
            raise _unknown(self._info, "its layers do not put out hidden states [batch, tokens, hidden]")
        return hidden.detach()
