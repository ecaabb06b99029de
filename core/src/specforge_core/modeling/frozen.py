# SPDX-License-Identifier: Apache-2.0
"""The target's own weights inside a draft: embedding and head, frozen.

They are non-persistent buffers, so a draft's ``state_dict`` is exactly its checkpoint, and they start as NaN, so one
that was never loaded is an error at first use instead of a silent zero.

Legend: V target vocabulary, H target hidden size, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from specforge_core.contracts import TargetError
from specforge_core.modeling.norm import rms_norm


def _load(buffer: Tensor, value: Tensor, name: str) -> None:
    if buffer.shape != value.shape:
        raise TargetError(f"the target's {name} is {list(value.shape)}, expected {list(buffer.shape)}")
    buffer.copy_(value)


class FrozenEmbedding(nn.Module):
    """The target's token embedding [V, H]."""

    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((vocab_size, hidden_size), float("nan")), persistent=False)

    def load(self, weight: Tensor) -> None:
        """:raises TargetError: another shape."""
        _load(self.weight, weight, "embed_tokens.weight")

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] int64 → [..., H]."""
        return functional.embedding(token_ids, self.weight)


class FrozenHead(nn.Module):
    """The target's head, and its final norm where features were captured before it (``norm: pre``).

    :param norm_eps: None where features have passed the final norm already.
    """

    weight: Tensor
    norm_weight: Tensor | None

    def __init__(self, vocab_size: int, hidden_size: int, *, norm_eps: float | None) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.register_buffer("weight", torch.full((vocab_size, hidden_size), float("nan")), persistent=False)
        norm = None if norm_eps is None else torch.full((hidden_size,), float("nan"))
        self.register_buffer("norm_weight", norm, persistent=False)

    def load(self, weight: Tensor, norm_weight: Tensor | None = None) -> None:
        """:raises TargetError: another shape."""
        _load(self.weight, weight, "lm_head.weight")
        if self.norm_weight is not None and norm_weight is not None:
            _load(self.norm_weight, norm_weight, "norm.weight")

    def require_loaded(self) -> None:
        """:raises TargetError: weights were never loaded."""
        missing = torch.isnan(self.weight[0, 0]).item()
        if missing or (self.norm_weight is not None and torch.isnan(self.norm_weight[0]).item()):
            raise TargetError("the target's head was never loaded into the draft", hint="this is a bug in the caller")

    @torch.no_grad()
    def logits(self, hidden_RH: Tensor) -> Tensor:
        """The target's logits, fp32 [R, V]. Callers pass chunks of rows: never a whole batch."""
        hidden_RH = hidden_RH.to(self.weight.dtype)
        if self.norm_weight is not None and self.norm_eps is not None:
            hidden_RH = rms_norm(hidden_RH, self.norm_weight, self.norm_eps)
        return (hidden_RH @ self.weight.T).float()
