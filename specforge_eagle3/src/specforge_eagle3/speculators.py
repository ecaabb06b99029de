# SPDX-License-Identifier: Apache-2.0
"""The ``speculators`` layout of an EAGLE3 export: what ``vllm serve DRAFT_DIRECTORY`` understands by itself.

Next to the EAGLE layout the layer is called ``layers.0``, captured layers are counted from one (0 is the embedding),
the vocabulary map is left out where the draft knows every token, and ``config.json`` names the target, so that the
directory can be served alone. ``norm_output`` is not carried over: there it means that the *normed* state is fed to
the next step, which this draft never does. The layout always norms before the head; a draft that does not has a norm
of ones, which scales each row by a positive factor and so changes no greedy guess; a field of our own remembers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.contracts import ExportError, TargetInfo
from specforge_core.contracts.kinds import FLAG, OBJECT, TEXT, shorten
from specforge_core.modeling.export_files import OUTPUT_IDS, check_fields
from torch import Tensor

from specforge_eagle3.config import DraftShape

SPECULATORS = "speculators"
TYPE_FIELD = "speculators_model_type"
_TYPE, _VERSION = "eagle3", "0.9.0"
_LAYER, _LAYER_THERE = "midlayer.", "layers.0."
_HEAD_NORM = "norm_before_head"
MAPS = ("t2d", "d2t")
_OUTER = ("draft_vocab_size", "target_hidden_size", "fc_norm")
_FIELDS = {
    TYPE_FIELD: TEXT,
    "transformer_layer_config": OBJECT,
    "eagle_aux_hidden_state_layer_ids": OUTPUT_IDS,
    **dict.fromkeys(("norm_before_residual", "norm_before_fc", "norm_output", _HEAD_NORM), FLAG),
}
_LAYER_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "mlp_bias", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"),
)


def to_speculators(config: Mapping[str, Any], target: TargetInfo, *, draft_tokens: int) -> dict[str, Any]:
    """``config.json`` of this layout from that of the EAGLE layout.

    :param draft_tokens: proposed per target pass unless the server is told otherwise.
    """
    aux = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        TYPE_FIELD: _TYPE,
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": _TYPE,
            "default_proposal_method": method["proposal_type"],
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier_path(target), "architectures": [target.architecture]},
        },
        "transformer_layer_config": {
            **{name: config[name] for name in _LAYER_FIELDS},
            "num_aux_hidden_states": len(aux),  # vLLM takes three for granted
        },
        **{name: config[name] for name in _OUTER},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in aux],
        "norm_before_residual": False,
        "norm_before_fc": False,
        "embed_requires_grad": False,
        _HEAD_NORM: config.get("norm_output", True),
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
    }


def check_head_norm(shape: DraftShape, tensors: Mapping[str, Tensor]) -> None:
    """:raises ExportError: a norm that the draft does not use would change what a server guesses."""
    if not shape.norm_output and not bool((tensors["norm.weight"] == 1).all()):
        raise ExportError(
            "strategy.norm_output is false, but norm.weight is not all ones; servers would apply it",
            hint="train without loading that norm",
        )


def verifier_path(target: TargetInfo) -> str:
    """The target as a server started anywhere on this machine finds it."""
    path = Path(target.name_or_path)
    return str(path.resolve()) if path.is_dir() else target.name_or_path


def from_speculators(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The EAGLE layout's fields from this layout's ``config.json``, read in ``directory``; the layer's are unchecked.

    :raises ExportError: a field is missing; a draft of another algorithm, or one that is wired otherwise.
    """
    fields = check_fields(config, _FIELDS, directory)
    if fields[TYPE_FIELD] != _TYPE:
        raise ExportError(
            f"not the config of an EAGLE3 draft but of type {shorten(fields[TYPE_FIELD])}",
            where=fields.where,
            hint="name an EAGLE3 export",
        )
    for name in ("norm_before_residual", "norm_before_fc", "norm_output"):
        # Left out, the first is true for those who wrote this format.
        if fields.get(name, name == "norm_before_residual"):
            raise ExportError(
                f"{name} is true there, and this draft's layer is wired otherwise",
                where=fields.where,
                hint="name an export of this program",
            )
    aux = [layer - 1 for layer in fields["eagle_aux_hidden_state_layer_ids"]]
    return {
        **fields["transformer_layer_config"],
        **{name: fields.get(name) for name in _OUTER},
        "norm_output": fields.get(_HEAD_NORM, True),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": aux},
    }


def rename_tensors(tensors: Mapping[str, Tensor], *, full_vocabulary: bool) -> dict[str, Tensor]:
    """The draft's tensors under this layout's names; without a map where there is nothing to map."""
    dropped = MAPS if full_vocabulary else ()
    renamed = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return {name.replace(_LAYER, _LAYER_THERE, 1): tensor for name, tensor in renamed.items()}


def restore_name(name: str) -> str:
    """The reverse of :func:`rename_tensors` for one name."""
    return name.replace(_LAYER_THERE, _LAYER, 1)
