# SPDX-License-Identifier: Apache-2.0
"""Runs one Domino golden vector through the same code that trains: loss and backward over the given anchors."""

from __future__ import annotations

import torch
from pydantic import ValidationError
from specforge_core.contracts import DataError
from specforge_core.testing.golden import GoldenResult, GoldenVector
from specforge_dflash.golden import gradients, load_weights, read_shape, run_step

from specforge_domino.config import DominoConfig
from specforge_domino.draft_model import DominoDraft
from specforge_domino.export import head_from_config
from specforge_domino.strategy import DominoStrategy

# What the vectors call each metric.
_NAMES = {
    "accuracy": "accuracy",
    "base_accuracy": "base_accuracy",
    "final_loss": "final_loss",
    "base_loss": "base_loss",
    "accept_len": "block_acceptance_length",
    "base_accept_len": "base_block_acceptance_length",
}


def run_golden(vector: GoldenVector) -> GoldenResult:
    """:raises DataError: tensors or settings that a Domino vector needs are missing or of another shape."""
    strategy = DominoStrategy(_config(vector))
    shape = read_shape(vector)
    draft = DominoDraft(shape, head_from_config(vector.draft_config))
    load_weights(draft, vector)
    output, loss = run_step(strategy, draft, vector)
    values = {name: torch.tensor(output.metrics[metric].value or 0.0) for name, metric in _NAMES.items()}
    values["accuracy_denom"] = torch.tensor(output.metrics["accuracy"].denominator)
    return GoldenResult({"loss": loss, **values}, gradients(draft))


def _config(vector: GoldenVector) -> DominoConfig:
    """The vector fixes λ itself: at step 0 that is where it starts."""
    options = dict(vector.options)
    if options.pop("loss_type", "dflash") != "dflash":
        raise DataError("Domino trains with cross-entropy alone", where=str(vector.path))
    options.pop("dpace_alpha", None)
    options["lambda_base_start"] = options.pop("lambda_base", 1.0)
    try:
        return DominoConfig.model_validate(options)
    except ValidationError as error:
        raise DataError(f"options that Domino does not know: {error}", where=str(vector.path)) from error
