# SPDX-License-Identifier: Apache-2.0
"""Embedding, final norm and head read straight from safetensors files: the rest of the model is not touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from specforge_core.contracts import EMBED_TOKENS, FINAL_NORM, LM_HEAD, TargetError, TargetInfo

from specforge_hf_target.config import language_section
from specforge_hf_target.model_files import locate_file

if TYPE_CHECKING:
    from torch import Tensor

    from specforge_hf_target.config import HfTargetConfig

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

# Under what names architectures keep them; a multimodal model has prefixes of its own before these.
_STORED_NAMES: Mapping[str, tuple[str, ...]] = {
    EMBED_TOKENS: ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"),
    FINAL_NORM: ("model.norm.weight", "language_model.norm.weight", "ln_f.weight", "final_layer_norm.weight"),
    LM_HEAD: ("lm_head.weight", "embed_out.weight"),
}
# These multiply the normed state by 1 + weight, which a bf16 copy of "the weight" could not say without rounding.
_OFFSET_NORMS = ("gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next", "qwen3_5", "qwen3_5_text")
_NONLINEAR_HEADS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def read_frozen_weights(config: HfTargetConfig, info: TargetInfo, names: Sequence[str]) -> dict[str, Tensor]:
    """The named weights in the target's dtype, on CPU, each a tensor of its own.

    :raises TargetError: a name or file that the target does not have, or weights of another shape.
    """
    where, settings = config.read_config()
    files = _WeightFiles(config)
    shapes = {
        EMBED_TOKENS: (info.vocab_size, info.hidden_size),
        FINAL_NORM: (info.hidden_size,),
        LM_HEAD: (info.vocab_size, info.hidden_size),
    }
    weights = {}
    for name in names:
        if name not in shapes:
            raise TargetError(
                f"{name!r} is not a weight an engine hands out", where=where, hint=f"there are {', '.join(shapes)}"
            )
        _check_meaning(name, language_section(settings), where)
        weight = files.read(name, tied=_is_tied(settings))
        if tuple(weight.shape) != shapes[name]:
            raise TargetError(
                f"{name} is {list(weight.shape)}, but config.json says {list(shapes[name])}",
                where=f"target {config.path}",
                hint="the weights and config.json are of different models",
            )
        weights[name] = weight.to(getattr(torch, info.dtype), copy=True)
    return weights


def _check_meaning(name: str, text: Mapping[str, Any], where: str) -> None:
    """Refuse weights that would be right in name and wrong in use."""
    kind = text.get("model_type")
    if name == FINAL_NORM and kind in _OFFSET_NORMS:
        raise TargetError(
            f"the final norm of {kind} scales by 1 + weight",
            where=where,
            hint="let the strategy capture last_hidden_states after the norm (post)",
        )
    for key, harmless in _NONLINEAR_HEADS.items():
        if name == LM_HEAD and text.get(key) not in (None, harmless):
            raise TargetError(
                f"its logits are not lm_head times the hidden state ({key} is {text[key]})",
                where=f"{where}: {key}",
                hint="such targets cannot be trained against yet",
            )


def _is_tied(settings: Mapping[str, Any]) -> bool:
    text = language_section(settings)
    return bool(text.get("tie_word_embeddings", settings.get("tie_word_embeddings", False)))


class _WeightFiles:
    """A model's safetensors files: one, or several behind an index."""

    def __init__(self, config: HfTargetConfig):
        self._config = config
        index = locate_file(config.path, INDEX_FILE, revision=config.revision)
        if index is not None:
            self._file_of = _read_index(index)
            return
        if locate_file(config.path, SINGLE_FILE, revision=config.revision) is None:
            raise TargetError(
                f"there is neither {SINGLE_FILE} nor {INDEX_FILE}",
                where=f"target {config.path}",
                hint="other weight formats are not read: load the model with transformers and save_pretrained it again",
            )
        with self._open(SINGLE_FILE) as file:
            self._file_of = dict.fromkeys(file.keys(), SINGLE_FILE)

    def read(self, name: str, *, tied: bool) -> Tensor:
        key = _find_key(name, self._file_of)
        if key is None and name == LM_HEAD and tied:
            key = _find_key(EMBED_TOKENS, self._file_of)
        if key is None:
            raise TargetError(
                f"no tensor is its {name}",
                where=f"target {self._config.path}",
                hint="the files are incomplete, or the architecture is not understood",
            )
        if name == FINAL_NORM and key.removesuffix("weight") + "bias" in self._file_of:
            raise TargetError(
                "its final norm is a LayerNorm with a bias",
                where=f"target {self._config.path}",
                hint="let the strategy capture last_hidden_states after the norm (post)",
            )
        with self._open(self._file_of[key]) as file:
            return file.get_tensor(key)

    def _open(self, name: str):
        path = locate_file(self._config.path, name, revision=self._config.revision)
        if path is None:
            raise TargetError("the file is missing", where=f"target {self._config.path}: {name}", hint="copy it again")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise TargetError(f"not readable as safetensors: {error}", where=str(path), hint="copy it again") from error


def _find_key(name: str, keys: Iterable[str]) -> str | None:
    """The shortest key that ends in one of the names this weight is stored under, at a dot."""
    endings = _STORED_NAMES[name]
    if name == FINAL_NORM:
        endings = ("norm.weight", *endings)
    found = []
    for key in keys:
        parts = key.split(".")
        if any(part.isdigit() for part in parts) or "vision" in key or "visual" in key:
            continue
        if any(key == ending or key.endswith("." + ending) for ending in endings):
            found.append(key)
    return min(found, key=lambda key: (len(key), key), default=None)


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"not a weight index: {error!r}", where=str(path), hint="copy it again") from error
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise TargetError("weight_map is not a table of file names", where=str(path), hint="copy it again")
    return files
