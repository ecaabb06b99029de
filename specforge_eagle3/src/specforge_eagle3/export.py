# SPDX-License-Identifier: Apache-2.0
"""Exports that servers load, ``config.json`` and ``model.safetensors``, in two layouts.

``sglang`` is the EAGLE layout: the draft's ``state_dict`` under its own names. ``speculators`` says the same in vLLM's
own words (:mod:`specforge_eagle3.speculators`). Embedding and target head stay with the target in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from specforge_core.contracts import DataError, ExportError, Norm, TargetInfo
from specforge_core.contracts.kinds import FLAG, OBJECT
from specforge_core.modeling import VocabMap
from specforge_core.modeling.export_files import (
    CONFIG_FILE,
    LAYER_FIELDS,
    LAYER_IDS,
    SIZE,
    WEIGHTS_FILE,
    Fields,
    check_fields,
    check_sizes,
    read_config,
    read_draft,
    write_files,
)

from specforge_eagle3.config import DraftShape
from specforge_eagle3.draft_model import Eagle3Draft
from specforge_eagle3.speculators import (
    MAPS,
    SPECULATORS,
    TYPE_FIELD,
    check_head_norm,
    from_speculators,
    rename_tensors,
    restore_name,
    to_speculators,
)

FORMATS = ("sglang", SPECULATORS)
ARCHITECTURE = "LlamaForCausalLMEagle3"
_FIELDS = {
    **LAYER_FIELDS,
    "draft_vocab_size": SIZE,
    "fc_norm": FLAG,
    "norm_output": FLAG,
    "eagle_config": OBJECT,
}
_EAGLE_FIELDS = {"eagle_aux_hidden_state_layer_ids": LAYER_IDS}


def draft_config(draft: Eagle3Draft, target: TargetInfo, aux_layer_ids: tuple[int, ...]) -> dict[str, Any]:
    """``config.json`` of the EAGLE layout: Llama's fields, and what is EAGLE3's own.

    SGLang reads the captured layers in ``eagle_config`` and adds one itself; vLLM reads those at the top, and takes
    them as they are. Both norm before the head unless told otherwise; said aloud, vLLM takes ``norm_output`` for a
    different wiring of the layer, so it is written only where it is off.
    """
    shape, rope = draft.shape, dict(draft.shape.rope_parameters)
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.target_hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": target.max_position_embeddings,
        # Both spellings: servers on older transformers read rope_theta and rope_scaling.
        "rope_parameters": {"rope_type": "default", **rope},
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "tie_word_embeddings": False,
        "fc_norm": shape.fc_norm,
        **({} if shape.norm_output else {"norm_output": False}),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(aux_layer_ids), "use_aux_hidden_state": True},
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in aux_layer_ids],
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids),
        "torch_dtype": str(draft.dtype).removeprefix("torch."),
    }


def write_export(
    draft: Eagle3Draft,
    directory: Path,
    *,
    format: str,
    target: TargetInfo,
    aux_layer_ids: tuple[int, ...],
    draft_tokens: int,
) -> None:
    """:param draft_tokens: proposed per target pass; ``speculators`` tells the server.
    :raises ExportError: an unknown format, or a draft that it cannot describe.
    """
    if format not in FORMATS:
        raise ExportError(f"eagle3 does not write the format {format!r}", hint=f"known: {', '.join(FORMATS)}")
    config = draft_config(draft, target, aux_layer_ids)
    tensors = draft.state_dict()
    if format == SPECULATORS:
        check_head_norm(draft.shape, tensors)
        config = to_speculators(config, target, draft_tokens=draft_tokens)
        tensors = rename_tensors(tensors, full_vocabulary=_is_full(draft.shape))
    write_files(directory, config, tensors)


def shape_from_config(config: Mapping[str, Any], *, last_hidden_norm: Norm) -> DraftShape:
    """A draft's shape from ``config.json`` (ours, or another trainer's in the same layout).

    :raises KeyError: a field without which there is no shape.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    captured = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return DraftShape(
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        hidden_size=hidden,
        target_hidden_size=config.get("target_hidden_size") or hidden,
        intermediate_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=rope,
        num_aux=len(captured) if captured else 3,
        fc_norm=bool(config.get("fc_norm", False)),
        norm_output=bool(config.get("norm_output", True)),
        last_hidden_norm=last_hidden_norm,
    )


def _read_fields(directory: Path) -> Fields:
    config, where = read_config(directory), str(directory / CONFIG_FILE)
    if TYPE_FIELD in config:
        config = from_speculators(config, directory)
    elif config.get("architectures") != [ARCHITECTURE]:
        raise ExportError(f"not the config of an EAGLE3 draft ({ARCHITECTURE})", where=where, hint=_ANOTHER)
    fields = check_fields(config, _FIELDS, directory)
    check_fields(fields.get("eagle_config", {}), _EAGLE_FIELDS, directory)
    return fields


def read_export(directory: Path, target: TargetInfo, *, last_hidden_norm: Norm) -> Eagle3Draft:
    """The draft of an export; its frozen parts are still to be loaded.

    :raises ExportError: files or weights missing, damaged, of another shape, or of another target's vocabulary.
    """
    shape = shape_from_config(_read_fields(directory), last_hidden_norm=last_hidden_norm)
    check_sizes(shape, target, directory)
    if shape.draft_vocab_size > shape.vocab_size:
        raise ExportError(
            f"{shape.draft_vocab_size} is more than the target's vocabulary of {shape.vocab_size}",
            where=f"{directory / CONFIG_FILE}: draft_vocab_size",
            hint=_ANOTHER,
        )
    full = _is_full(shape)
    draft = read_draft(
        lambda: Eagle3Draft(shape, VocabMap.full(shape.vocab_size) if full else _placeholder(shape)),
        directory,
        rename=restore_name,
        may_lack=MAPS if full else (),  # nothing to map, so a layout may leave the maps out
    )
    try:
        draft.vocabulary.check()
    except DataError as error:
        raise ExportError(error.message, where=str(directory / WEIGHTS_FILE), hint=_ANOTHER) from error
    return draft


_ANOTHER = "name an EAGLE3 export"


def _is_full(shape: DraftShape) -> bool:
    return shape.draft_vocab_size == shape.vocab_size


def _placeholder(shape: DraftShape) -> VocabMap:
    """Tensors of the right shapes, overwritten by the stored ones."""
    return VocabMap(
        torch.zeros(shape.vocab_size, dtype=torch.bool), torch.zeros(shape.draft_vocab_size, dtype=torch.int64)
    )
