# SPDX-License-Identifier: Apache-2.0
"""Runs one EAGLE3 golden vector through the same code that trains: measure, loss, backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import ValidationError
from specforge_core.contracts import (
    AUX_HIDDEN_STATES,
    EMBED_TOKENS,
    FINAL_NORM,
    INPUT_IDS,
    LAST_HIDDEN_STATES,
    LM_HEAD,
    LOSS_MASK,
    Batch,
    DataError,
    StepContext,
)
from specforge_core.modeling import VocabMap
from specforge_core.testing.golden import GoldenResult, GoldenVector, require
from torch import Tensor

from specforge_eagle3.config import DraftShape, Eagle3Config
from specforge_eagle3.draft_model import Eagle3Draft
from specforge_eagle3.export import shape_from_config
from specforge_eagle3.loss import StepWeights, UnrollSums
from specforge_eagle3.strategy import Eagle3Strategy
from specforge_eagle3.unroll import ATTENTION_MASK


def run_golden(vector: GoldenVector) -> GoldenResult:
    """:raises DataError: tensors or settings that an EAGLE3 vector needs are missing or of another shape."""
    config = _config(vector)
    strategy, draft, batch = Eagle3Strategy(config), _draft(vector), _batch(vector)
    context = StepContext(step=0, total_steps=1, denominators=batch.denominators)
    if strategy.measures:
        with torch.no_grad():
            context = replace(context, measured=strategy.measure(draft, batch, context))
    (term,) = strategy.loss(draft, batch, context).terms
    loss = term.weight * term.numerator / batch.denominators[term.denominator]
    loss.backward()
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in draft.named_parameters()
    }
    nothing = (0.0,) * config.ttt_steps
    with torch.no_grad():
        sums = draft(batch.tensors, steps=config.ttt_steps, weights=StepWeights(nothing, nothing, nothing))
    values = _values(config, sums, batch.denominators[config.loss_normalizer])
    return GoldenResult({"loss": loss.detach(), **values}, grads)


def _values(config: Eagle3Config, sums: UnrollSums, divisor: float) -> dict[str, Tensor]:
    """Metrics per step, straight from the formulas: the trained numerator is assembled elsewhere."""
    counted = sums.counted.clamp_min(1e-8)
    kl, alpha, log_alpha = sums.kl / divisor, sums.alpha / counted, sums.log_alpha / counted
    share = config.kl_scale * torch.exp(-config.kl_decay * alpha)
    per_step = {"none": kl, "alpha": -log_alpha, "lambda": share * kl + (1 - share) * (1 - alpha)}
    return {
        "loss_per_step": per_step[config.lk_loss_type],
        "acceptance_rate_per_step": alpha,
        "accuracy_per_step": sums.correct / sums.trained.clamp_min(1),
        "accuracy_denominator_per_step": sums.trained,
        "correct_per_step": sums.correct,
    }


def _config(vector: GoldenVector) -> Eagle3Config:
    options = dict(vector.options)
    options["lk_loss_type"] = options.get("lk_loss_type") or "none"
    try:
        return Eagle3Config.model_validate(options)
    except ValidationError as error:
        raise DataError(f"options that EAGLE3 does not know: {error}", where=str(vector.path)) from error


def _shape(vector: GoldenVector) -> DraftShape:
    config = {"rms_norm_eps": 1e-6, **vector.draft_config}
    try:
        shape = shape_from_config(config, last_hidden_norm="pre" if FINAL_NORM in vector.frozen else "post")
    except KeyError as error:
        raise DataError(f"draft_config lacks {error}", where=str(vector.path)) from error
    joined = require(vector.weights, "fc.weight", group="weights", path=vector.path).shape[1]
    return replace(shape, num_aux=joined // shape.target_hidden_size)


def _draft(vector: GoldenVector) -> Eagle3Draft:
    shape, path = _shape(vector), vector.path
    draft = Eagle3Draft(shape, _vocabulary(vector, shape))
    state = {}
    for name, value in draft.state_dict().items():
        unused = name == "norm.weight" and not shape.norm_output
        if name in ("t2d", "d2t") or (unused and name not in vector.weights):
            state[name] = value
            continue
        stored = require(vector.weights, name, group="weights", path=path)
        if stored.shape != value.shape:
            raise DataError(f"'weights.{name}' is {list(stored.shape)}, not {list(value.shape)}", where=str(path))
        state[name] = stored
    draft.load_state_dict(state)
    embedding = vector.frozen.get(EMBED_TOKENS, vector.weights.get(EMBED_TOKENS))
    if embedding is None:
        raise DataError(f"the tensor 'weights.{EMBED_TOKENS}' is missing", where=str(path))
    draft.embed_tokens.load(embedding)
    head = require(vector.frozen, LM_HEAD, group="frozen", path=path)
    draft.target_head.load(head, vector.frozen.get(FINAL_NORM))
    return draft


def _vocabulary(vector: GoldenVector, shape: DraftShape) -> VocabMap:
    if shape.draft_vocab_size == shape.vocab_size and "t2d" not in vector.weights:
        return VocabMap.full(shape.vocab_size)
    t2d, d2t = (require(vector.weights, name, group="weights", path=vector.path) for name in ("t2d", "d2t"))
    vocabulary = VocabMap(t2d.bool(), d2t.long())
    vocabulary.check()
    return vocabulary


def _batch(vector: GoldenVector) -> Batch:
    inputs, path = vector.inputs, vector.path
    names = (INPUT_IDS, LOSS_MASK, AUX_HIDDEN_STATES, LAST_HIDDEN_STATES)
    ids, mask, aux, last = (require(inputs, name, group="inputs", path=path) for name in names)
    tensors = {
        INPUT_IDS: ids,
        LOSS_MASK: mask.bool(),
        AUX_HIDDEN_STATES: aux.unflatten(-1, (-1, last.shape[-1])) if aux.dim() == 3 else aux,
        LAST_HIDDEN_STATES: last,
    }
    if ATTENTION_MASK in inputs:
        tensors[ATTENTION_MASK] = inputs[ATTENTION_MASK]
    # As the trainer that made the vectors counts them: padding included.
    denominators = {"tokens": float(mask.sum()), "positions": float(ids.numel()), "samples": float(ids.shape[0])}
    return Batch(tensors, denominators, num_samples=ids.shape[0], num_tokens=ids.numel())
