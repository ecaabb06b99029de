# SPDX-License-Identifier: Apache-2.0
"""Random EAGLE3 drafts and features of tiny shapes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from specforge_core.contracts import Batch
from specforge_core.modeling import VocabMap
from specforge_eagle3.config import DraftShape
from specforge_eagle3.draft_model import Eagle3Draft
from torch import Tensor


def make_draft(*, seed: int = 0, **changes: object) -> Eagle3Draft:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 61,
        "draft_vocab_size": 30,
        "hidden_size": 32,
        "target_hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        **changes,
    }
    shape = DraftShape(**settings)
    vocabulary = VocabMap.full(shape.vocab_size)
    if shape.draft_vocab_size < shape.vocab_size:
        vocabulary = VocabMap.from_counts(torch.randint(1, 100, (shape.vocab_size,)), shape.draft_vocab_size)
    draft = Eagle3Draft(shape, vocabulary)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.2))
            if parameter.dim() == 1:
                parameter.add_(1)
    draft.embed_tokens.load(torch.randn(shape.vocab_size, shape.hidden_size))
    norm = torch.rand(shape.target_hidden_size) + 0.5 if shape.last_hidden_norm == "pre" else None
    draft.target_head.load(torch.randn(shape.vocab_size, shape.target_hidden_size) * 0.3, norm)
    return draft


def make_tensors(draft: Eagle3Draft, mask: Tensor, *, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, length = mask.shape
    shape = draft.shape

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return {
        "input_ids": torch.randint(0, shape.vocab_size, (batch, length), generator=generator),
        "loss_mask": mask.bool(),
        "aux_hidden_states": randn(batch, length, shape.num_aux, shape.target_hidden_size),
        "last_hidden_states": randn(batch, length, shape.target_hidden_size),
    }


def as_batch(tensors: dict[str, Tensor]) -> Batch:
    size = tensors["input_ids"].numel()
    denominators = {"tokens": float(tensors["loss_mask"].sum()), "positions": float(size)}
    return Batch(tensors, denominators, num_samples=tensors["input_ids"].shape[0], num_tokens=size)


MASKS = SimpleNamespace(
    full=torch.ones(2, 20),
    spans=torch.tensor([[0] * 8 + [1] * 5 + [0] * 7, [0] * 3 + [1] * 4 + [0] * 6 + [1] * 3 + [0] * 4]),
    start_only=torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0, 0, 0], [1] + [0] * 9]),
    end_only=torch.tensor([[0] * 9 + [1], [0] * 8 + [1, 1]]),
    one_sample=torch.tensor([[0] * 12, [0] * 5 + [1] * 4 + [0] * 3]),
    shorter_than_unroll=torch.ones(2, 4),
)
