# SPDX-License-Identifier: Apache-2.0
"""Runs one DFlash golden vector through the same code that trains: loss and backward over the given anchors."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import ValidationError
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    INPUT_IDS,
    LM_HEAD,
    LOSS_MASK,
    Batch,
    DataError,
    StepContext,
    StepOutput,
)
from specforge_core.testing.golden import GoldenResult, GoldenVector, require
from torch import Tensor

from specforge_dflash.config import DflashConfig, DraftShape
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.export import shape_from_config
from specforge_dflash.rows import ANCHOR_KEEP, ANCHORS
from specforge_dflash.strategy import BlockStrategy, DflashStrategy


def run_golden(vector: GoldenVector) -> GoldenResult:
    """:raises DataError: tensors or settings that a DFlash vector needs are missing or of another shape."""
    try:
        strategy = DflashStrategy(DflashConfig.model_validate(dict(vector.options)))
    except ValidationError as error:
        raise DataError(f"options that DFlash does not know: {error}", where=str(vector.path)) from error
    draft = DflashDraft(read_shape(vector))
    load_weights(draft, vector)
    output, loss = run_step(strategy, draft, vector)
    accuracy = output.metrics["accuracy"]
    values = {
        "loss": loss,
        "accuracy": torch.tensor(accuracy.value or 0.0),
        "accuracy_denom": torch.tensor(accuracy.denominator),
    }
    return GoldenResult(values, gradients(draft))


def read_shape(vector: GoldenVector) -> DraftShape:
    """The draft's shape; the number of captured layers follows from ``fc``.

    :raises DataError: ``draft_config`` lacks a field.
    """
    config = {"rms_norm_eps": 1e-6, **vector.draft_config}
    try:
        shape = shape_from_config(config)
    except KeyError as error:
        raise DataError(f"draft_config lacks {error}", where=str(vector.path)) from error
    joined = require(vector.weights, "fc.weight", group="weights", path=vector.path).shape[1]
    return replace(shape, num_aux=joined // shape.target_hidden_size)


def load_weights(draft: DflashDraft, vector: GoldenVector) -> None:
    """:raises DataError: a weight is missing or has another shape."""
    state = {}
    for name, value in draft.state_dict().items():
        stored = require(vector.weights, name, group="weights", path=vector.path)
        if stored.shape != value.shape:
            raise DataError(
                f"'weights.{name}' is {list(stored.shape)}, not {list(value.shape)}", where=str(vector.path)
            )
        state[name] = stored
    draft.load_state_dict(state)
    draft.embed_tokens.load(require(vector.frozen, EMBED_TOKENS, group="frozen", path=vector.path))
    draft.target_head.load(require(vector.frozen, LM_HEAD, group="frozen", path=vector.path))


def _batch(strategy: BlockStrategy, vector: GoldenVector, draft: DflashDraft) -> Batch:
    names = (INPUT_IDS, LOSS_MASK, AUX_HIDDEN_STATES, ANCHORS, ANCHOR_KEEP)
    tensors = {name: require(vector.inputs, name, group="inputs", path=vector.path) for name in names}
    aux = tensors[AUX_HIDDEN_STATES]
    if aux.dim() == 3:
        tensors[AUX_HIDDEN_STATES] = aux.unflatten(-1, (draft.shape.num_aux, -1))
    tensors[LOSS_MASK], tensors[ANCHOR_KEEP] = tensors[LOSS_MASK].bool(), tensors[ANCHOR_KEEP].bool()
    ids = tensors[INPUT_IDS]
    return Batch(tensors, strategy.count(tensors), num_samples=ids.shape[0], num_tokens=ids.numel())


def run_step(strategy: BlockStrategy, draft: DflashDraft, vector: GoldenVector) -> tuple[StepOutput, Tensor]:
    """What the strategy's loss gives for the vector's inputs, and the loss; gradients are left in the draft."""
    batch = _batch(strategy, vector, draft)
    output = strategy.loss(draft, batch, StepContext(step=0, total_steps=1, denominators=batch.denominators))
    parts = [t.numerator * (t.weight / max(batch.denominators[t.denominator], 1e-8)) for t in output.terms]
    loss = torch.stack(parts).sum()
    loss.backward()
    return output, loss.detach()


def gradients(draft: DflashDraft) -> dict[str, Tensor]:
    """Gradients by checkpoint name; zeros where nothing flowed."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in draft.named_parameters()}
