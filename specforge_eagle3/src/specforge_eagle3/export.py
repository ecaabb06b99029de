# SPDX-License-Identifier: Apache-2.0
"""Exports that servers load, ``config.json`` and ``model.safetensors``, in two layouts.

``sglang`` is the EAGLE layout: the draft's ``state_dict`` under its own names. ``speculators`` says the same in vLLM's
own words (:mod:`specforge_eagle3.speculators`). Embedding and target head stay with the target in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from specforge_core.contracts import ExportError, Norm, SpecForgeError, TargetInfo
from specforge_core.modeling import VocabMap
from torch import Tensor

from specforge_eagle3.config import DraftShape
from specforge_eagle3.draft_model import Eagle3Draft
from specforge_eagle3.speculators import (
    SPECULATORS,
    TYPE_FIELD,
    check_head_norm,
    from_speculators,
    rename_tensors,
    restore_names,
    to_speculators,
)

FORMATS = ("sglang", SPECULATORS)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE = "LlamaForCausalLMEagle3"
_SIZES = (
    *("vocab_size", "draft_vocab_size", "hidden_size", "target_hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_AGAIN = "export the draft again"


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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    if format == SPECULATORS:
        check_head_norm(draft.shape, tensors)
        config = to_speculators(config, target, draft_tokens=draft_tokens)
        tensors = rename_tensors(tensors, full_vocabulary=_is_full(draft.shape))
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def shape_from_config(config: dict[str, Any], *, last_hidden_norm: Norm) -> DraftShape:
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


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            "no such file", where=str(path), hint="an export holds config.json and model.safetensors"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"not JSON: {error}", where=str(path), hint=_AGAIN) from error
    if isinstance(config, dict) and TYPE_FIELD in config:
        try:
            config = from_speculators(config, path)
        except KeyError as error:
            raise ExportError(f"the field {error} is missing", where=str(path), hint=_AGAIN) from error
    elif not isinstance(config, dict) or config.get("architectures") != [ARCHITECTURE]:
        raise ExportError(
            f"not the config of an EAGLE3 draft ({ARCHITECTURE})", where=str(path), hint="name an EAGLE3 export"
        )
    wrong = [key for key in _SIZES if config.get(key) is not None and not _is_size(config[key])]
    if wrong:
        raise ExportError(f"{config[wrong[0]]!r} is no size", where=f"{path}: {wrong[0]}", hint=_AGAIN)
    return config


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def read_export(directory: Path, target: TargetInfo, *, last_hidden_norm: Norm) -> Eagle3Draft:
    """The draft of an export; its frozen parts are still to be loaded.

    :raises ExportError: files or weights missing, of another shape, or of another target's vocabulary.
    """
    config, path = _read_config(directory), directory / WEIGHTS_FILE
    try:
        shape = shape_from_config(config, last_hidden_norm=last_hidden_norm)
    except KeyError as error:
        raise ExportError(f"the field {error} is missing", where=str(directory / CONFIG_FILE), hint=_AGAIN) from error
    if shape.vocab_size != target.vocab_size:
        raise ExportError(
            f"the draft is for a vocabulary of {shape.vocab_size}, the target has {target.vocab_size}",
            where=str(directory / CONFIG_FILE),
            hint="use the target it was trained with",
        )
    draft = Eagle3Draft(shape, VocabMap.full(shape.vocab_size) if _is_full(shape) else _placeholder(shape))
    expected, tensors = draft.state_dict(), _read_tensors(path)
    if _is_full(shape):  # nothing to map, so a layout may leave the maps out
        tensors = {"t2d": draft.t2d, "d2t": draft.d2t, **tensors}
    for name, value in expected.items():
        if name not in tensors:
            raise ExportError(f"the weight {name} is missing", where=str(path), hint=_AGAIN)
        if tensors[name].shape != value.shape:
            raise ExportError(
                f"the weight {name} is {list(tensors[name].shape)}, expected {list(value.shape)}",
                where=str(path),
                hint=_AGAIN,
            )
    draft.to(tensors["fc.weight"].dtype).load_state_dict({name: tensors[name] for name in expected})
    try:
        draft.vocabulary.check()
    except SpecForgeError as error:
        raise ExportError(error.message, where=str(path)) from error
    return draft


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExportError("no such file", where=str(path), hint="an export holds config.json and model.safetensors")
    try:
        with safe_open(path, "pt") as stored:
            return restore_names({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ExportError(f"unreadable weights: {error}", where=str(path), hint=_AGAIN) from error


def _is_full(shape: DraftShape) -> bool:
    return shape.draft_vocab_size == shape.vocab_size


def _placeholder(shape: DraftShape) -> VocabMap:
    """Tensors of the right shapes, overwritten by the stored ones."""
    return VocabMap(
        torch.zeros(shape.vocab_size, dtype=torch.bool), torch.zeros(shape.draft_vocab_size, dtype=torch.int64)
    )
