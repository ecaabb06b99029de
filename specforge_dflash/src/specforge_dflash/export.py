# SPDX-License-Identifier: Apache-2.0
"""Exports that servers load, ``config.json`` and ``model.safetensors``, in two layouts.

The files hold the draft's ``state_dict`` under its own names; embedding and head stay with the target. In the DFlash
layout (``sglang``) captured layers are written as they are counted here (zero-based layers whose output is taken):
SGLang and vLLM both add one themselves. ``speculators`` is vLLM's own (:mod:`specforge_dflash.speculators`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from specforge_core.contracts import ExportError, TargetInfo
from torch import Tensor, nn

from specforge_dflash.config import DraftShape, LayerType
from specforge_dflash.draft_model import DflashDraft
from specforge_dflash.speculators import SPECULATORS, TYPE_FIELD, from_speculators, to_speculators

FORMATS = ("sglang", SPECULATORS)
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ARCHITECTURE = "DFlashDraftModel"


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


def write_files(draft: nn.Module, directory: Path, config: Mapping[str, Any]) -> None:
    """``config.json`` and the draft's ``state_dict`` as ``model.safetensors``."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in draft.state_dict().items()}
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def write_export(
    draft: DflashDraft, directory: Path, *, format: str, target: TargetInfo, aux_layer_ids: tuple[int, ...]
) -> None:
    """:raises ExportError: an unknown format, or a draft that it cannot describe."""
    if format not in FORMATS:
        raise ExportError(f"dflash does not write the format {format!r}", hint=f"known: {', '.join(FORMATS)}")
    config = draft_config(draft, target, aux_layer_ids)
    write_files(draft, directory, to_speculators(config, target) if format == SPECULATORS else config)


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


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a block-parallel draft.

    :raises ExportError: no such file, or one of something else.
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            "no such file", where=str(path), hint="an export holds config.json and model.safetensors"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"not JSON: {error}", where=str(path)) from error
    if isinstance(config, dict) and TYPE_FIELD in config:
        try:
            return from_speculators(config, path)
        except KeyError as error:
            raise ExportError(f"the field {error} is missing", where=str(path)) from error
    if not isinstance(config, dict) or config.get("architectures") != [ARCHITECTURE]:
        raise ExportError(f"not the config of a DFlash draft ({ARCHITECTURE})", where=str(path))
    return config


def read_shape(config: Mapping[str, Any], directory: Path, target: TargetInfo) -> DraftShape:
    """:raises ExportError: a field is missing, or the draft is for another target's vocabulary."""
    path = str(directory / CONFIG_FILE)
    try:
        shape = shape_from_config(config)
    except KeyError as error:
        raise ExportError(f"the field {error} is missing", where=path) from error
    if (shape.vocab_size, shape.hidden_size) != (target.vocab_size, target.hidden_size):
        raise ExportError(
            f"the draft is for a vocabulary of {shape.vocab_size} and hidden size {shape.hidden_size}, "
            f"the target has {target.vocab_size} and {target.hidden_size}",
            where=path,
            hint="use the target it was trained with",
        )
    return shape


def fill_weights(draft: DflashDraft, directory: Path) -> None:
    """Load ``model.safetensors`` into a draft of the right shape, in the stored dtype.

    :raises ExportError: weights missing, or of another shape.
    """
    path, expected = directory / WEIGHTS_FILE, draft.state_dict()
    if not path.is_file():
        raise ExportError("no such file", where=str(path), hint="an export holds config.json and model.safetensors")
    try:
        with safe_open(path, "pt") as stored:
            tensors: dict[str, Tensor] = {n: stored.get_tensor(n) for n in stored.keys() if n in expected}  # noqa: SIM118
    except SafetensorError as error:
        raise ExportError(f"unreadable weights: {error}", where=str(path)) from error
    for name, value in expected.items():
        if name not in tensors:
            raise ExportError(f"the weight {name} is missing", where=str(path))
        if tensors[name].shape != value.shape:
            raise ExportError(
                f"the weight {name} is {list(tensors[name].shape)}, expected {list(value.shape)}", where=str(path)
            )
    draft.to(tensors["fc.weight"].dtype).load_state_dict(tensors)


def read_export(directory: Path, target: TargetInfo) -> DflashDraft:
    """The draft of an export; its frozen parts are still to be loaded.

    :raises ExportError: files or weights missing, of another shape, or of another target's vocabulary.
    """
    config = read_config(directory)
    kind = config.get("dflash_config", {}).get("projector_type")
    if kind is not None:
        raise ExportError(f"this draft has a {kind!r} head; it is not a plain DFlash draft", where=str(directory))
    draft = DflashDraft(read_shape(config, directory, target))
    fill_weights(draft, directory)
    return draft
