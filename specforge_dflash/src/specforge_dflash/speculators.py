# SPDX-License-Identifier: Apache-2.0
"""The ``speculators`` layout of a DFlash export: what ``vllm serve DRAFT_DIRECTORY`` understands by itself.

The tensors are those of the DFlash layout, names included. ``config.json`` counts captured layers from one (0 is the
embedding) and names the target, so that the directory can be served alone. ``sliding_window_non_causal`` says whether
the slots of a block see each other both ways in *sliding* layers (ours do not); in full layers they always do. vLLM
0.32 takes it for all layers together, so it is true where there is no sliding layer, and a draft that mixes both
kinds is served from the DFlash layout instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specforge_core.contracts import ExportError, TargetInfo
from specforge_core.contracts.kinds import FLAG, OBJECT, TEXT, list_of, shorten
from specforge_core.modeling.export_files import MAX_LAYERS, OUTPUT_IDS, check_fields

SPECULATORS = "speculators"
TYPE_FIELD = "speculators_model_type"
_TYPE, _VERSION = "dflash", "0.9.0"
_FIELDS = {
    TYPE_FIELD: TEXT,
    "transformer_layer_config": OBJECT,
    "aux_hidden_state_layer_ids": OUTPUT_IDS,
    **dict.fromkeys(("sample_from_anchor", "sliding_window_non_causal"), FLAG),
}
_LAYER_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "attention_dropout", "rms_norm_eps"),
    *("max_position_embeddings", "rope_parameters", "rope_theta", "rope_scaling", "tie_word_embeddings"),
    *("layer_types", "sliding_window", "use_sliding_window"),
)


def to_speculators(config: Mapping[str, Any], target: TargetInfo) -> dict[str, Any]:
    """``config.json`` of this layout from that of the DFlash layout."""
    own = config["dflash_config"]
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": config["block_size"] - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["DFlashDraftModel"],
        TYPE_FIELD: _TYPE,
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": _TYPE,
            "default_proposal_method": method["proposal_type"],
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier_path(target), "architectures": [target.architecture]},
        },
        "transformer_layer_config": {name: config[name] for name in _LAYER_FIELDS},
        "draft_vocab_size": config["vocab_size"],
        "target_hidden_size": config["target_hidden_size"],
        "block_size": config["block_size"],
        "aux_hidden_state_layer_ids": [layer + 1 for layer in own["target_layer_ids"]],
        "mask_token_id": own["mask_token_id"],
        "sample_from_anchor": False,
        "sliding_window_non_causal": "sliding_attention" not in config["layer_types"],
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
    }


def verifier_path(target: TargetInfo) -> str:
    """The target as a server started anywhere on this machine finds it."""
    path = Path(target.name_or_path)
    return str(path.resolve()) if path.is_dir() else target.name_or_path


def from_speculators(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The DFlash layout's fields from this layout's ``config.json``, read in ``directory``; the layer's are unchecked.

    :raises ExportError: a field is missing; a draft of another algorithm, or one that guesses otherwise.
    """
    fields = check_fields(config, _FIELDS, directory)
    layer = check_fields(fields["transformer_layer_config"], {"layer_types": list_of(TEXT, most=MAX_LAYERS)}, directory)
    full = "sliding_attention" not in layer.get("layer_types", ())
    if fields[TYPE_FIELD] != _TYPE:
        problem = f"not the config of a DFlash draft but of type {shorten(fields[TYPE_FIELD])}"
    elif fields.get("sample_from_anchor", False):
        problem = "sample_from_anchor is true: this draft guesses from a block's first slot, DFlash's does not"
    elif fields.get("sliding_window_non_causal", True) != full:
        problem = "sliding_window_non_causal does not fit layer_types: full layers look both ways, sliding ones back"
    else:
        own = {
            "mask_token_id": fields["mask_token_id"],
            "target_layer_ids": [layer_id - 1 for layer_id in fields["aux_hidden_state_layer_ids"]],
        }
        sizes = {name: fields[name] for name in ("block_size", "target_hidden_size")}
        return {**layer, **sizes, "dflash_config": own}
    raise ExportError(problem, where=fields.where, hint="name a DFlash export of this program")
