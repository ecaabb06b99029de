# SPDX-License-Identifier: Apache-2.0
"""Exports that servers load, ``config.json`` and ``model.safetensors``, in two layouts.

The files hold the draft's ``state_dict`` under its own names; embedding and head stay with the target. In the DFlash
layout (``sglang``) captured layers are written as they are counted here (zero-based layers whose output is taken):
SGLang and vLLM both add one themselves. ``speculators`` is vLLM's own (:mod:`specforge_dflash.speculators`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from specforge_core.contracts import ExportError, TargetInfo
from specforge_core.contracts.kinds import OBJECT, TEXT, Kind, list_of, shorten, whole_number
from specforge_core.modeling.export_files import (
    CONFIG_FILE,
    LAYER_COUNT,
    LAYER_FIELDS,
    LAYER_IDS,
    MAX_LAYERS,
    MAX_SIZE,
    SIZE,
    Fields,
    check_fields,
    check_sizes,
    read_config,
    read_draft,
    write_files,
)

from specforge_dflash.config import MAX_BLOCK_SIZE, DraftShape, LayerType
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.speculators import SPECULATORS, TYPE_FIELD, from_speculators, to_speculators

FORMATS = ("sglang", SPECULATORS)
ARCHITECTURE = "DFlashDraftModel"
_ANOTHER = "name a DFlash export"
_FIELDS = {
    **LAYER_FIELDS,
    "num_hidden_layers": LAYER_COUNT,
    "layer_types": list_of(Kind("a kind of attention", lambda value: value in get_args(LayerType)), most=MAX_LAYERS),
    "sliding_window": SIZE,
    "block_size": whole_number(2, MAX_BLOCK_SIZE),
    "dflash_config": OBJECT,
}
_OWN_FIELDS = {"target_layer_ids": LAYER_IDS, "mask_token_id": whole_number(0, MAX_SIZE), "projector_type": TEXT}


def draft_config(
    draft: DflashDraft, target: TargetInfo, aux_layer_ids: tuple[int, ...], *, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``config.json``: Qwen3's fields, and what is DFlash's own.

    :param extra: more fields of ``dflash_config``.
    """
    shape, rope = draft.shape, dict(draft.shape.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.target_hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": len(shape.layer_types),
        "num_target_layers": target.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": target.max_position_embeddings,
        # Both spellings: servers on older transformers read rope_theta and rope_scaling.
        "rope_parameters": {"rope_type": "default", **rope},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "tie_word_embeddings": False,
        "block_size": shape.block_size,
        "layer_types": list(shape.layer_types),
        "sliding_window": shape.sliding_window,
        "use_sliding_window": shape.sliding_window is not None,
        "dflash_config": {
            "mask_token_id": shape.mask_token_id,
            "target_layer_ids": list(aux_layer_ids),
            **(extra or {}),
        },
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids),
        "torch_dtype": str(draft.dtype).removeprefix("torch."),
    }


def write_export(
    draft: DflashDraft, directory: Path, *, format: str, target: TargetInfo, aux_layer_ids: tuple[int, ...]
) -> None:
    """:raises ExportError: an unknown format, or a draft that it cannot describe."""
    if format not in FORMATS:
        raise ExportError(f"dflash does not write the format {format!r}", hint=f"known: {', '.join(FORMATS)}")
    config = draft_config(draft, target, aux_layer_ids)
    write_files(directory, to_speculators(config, target) if format == SPECULATORS else config, draft.state_dict())


def shape_from_config(config: Mapping[str, Any]) -> DraftShape:
    """A draft's shape from ``config.json`` (ours, or another trainer's in the same layout).

    :raises KeyError: a field without which there is no shape.
    """
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    everywhere: LayerType = "full_attention"
    own = config["dflash_config"]
    return DraftShape(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        target_hidden_size=config.get("target_hidden_size") or hidden,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=rope,
        num_aux=len(own["target_layer_ids"]),
        block_size=config["block_size"],
        mask_token_id=own["mask_token_id"],
        layer_types=tuple(config.get("layer_types") or (everywhere,) * layers),
        sliding_window=config.get("sliding_window"),
    )


def read_fields(directory: Path, *, more: Mapping[str, Kind] | None = None) -> Fields:
    """The checked fields of a block-parallel draft's ``config.json``, those under ``dflash_config`` too.

    :param more: kinds of more fields of ``dflash_config``.
    :raises ExportError: no such file, or one of something else.
    """
    config, where = read_config(directory), str(directory / CONFIG_FILE)
    if TYPE_FIELD in config:
        config = from_speculators(config, directory)
    elif config.get("architectures") != [ARCHITECTURE]:
        raise ExportError(f"not the config of a DFlash draft ({ARCHITECTURE})", where=where, hint=_ANOTHER)
    fields = check_fields(config, _FIELDS, directory)
    own = check_fields(fields["dflash_config"], {**_OWN_FIELDS, **(more or {})}, directory)
    return Fields({**fields, "dflash_config": own}, where)


def read_shape(fields: Fields, directory: Path, target: TargetInfo) -> DraftShape:
    """:raises ExportError: a field is missing or at odds with another, or the draft is for another target."""
    shape = shape_from_config(fields)
    check_sizes(shape, target, directory)
    if len(shape.layer_types) != fields["num_hidden_layers"]:
        reason, key = f"names {len(shape.layer_types)} of {fields['num_hidden_layers']} layers", "layer_types"
    elif "sliding_attention" in shape.layer_types and shape.sliding_window is None:
        reason, key = "the sliding layers have no window", "sliding_window"
    elif shape.mask_token_id >= target.vocab_size:
        reason, key = f"{shape.mask_token_id} is outside the vocabulary of {target.vocab_size}", "mask_token_id"
    else:
        return shape
    raise ExportError(reason, where=f"{fields.where}: {key}", hint=_ANOTHER)


def read_export(directory: Path, target: TargetInfo) -> DflashDraft:
    """The draft of an export; its frozen parts are still to be loaded.

    :raises ExportError: files or weights missing, damaged, of another shape, or of another target's vocabulary.
    """
    fields = read_fields(directory)
    kind = fields["dflash_config"].get("projector_type")
    if kind is not None:
        raise ExportError(
            f"this draft has a {shorten(kind)} head; it is not a plain DFlash draft",
            where=str(directory),
            hint=_ANOTHER,
        )
    shape = read_shape(fields, directory, target)
    return read_draft(lambda: DflashDraft(shape), directory)
