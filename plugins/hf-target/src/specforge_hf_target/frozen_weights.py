# SPDX-License-Identifier: Apache-2.0
"""Embedding, final norm and head read straight from safetensors files: the rest of the model is not touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from specforge_core.contracts import EMBED_TOKENS, FINAL_NORM, LM_HEAD, TargetError, TargetInfo
from specforge_core.contracts.kinds import shorten

from specforge_hf_target.config import language_section
from specforge_hf_target.model_files import find_directory, locate_file, read_model_json

if TYPE_CHECKING:
    from torch import Tensor

    from specforge_hf_target.config import HfTargetConfig

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

PARAMETERS_PER_BYTE = 16
"""More than any format stores: one bit for each, and a head that is stored once and counted twice."""
# Parts that begin with a dot, ".." among them, leave the directory or hide in it; an absolute path begins with no part.
_SHARD = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*\.safetensors")
_FLOATS = ("F64", "F32", "BF16", "F16")

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
        weight = files.read(name, shapes[name], tied=_is_tied(settings, where))
        weights[name] = weight.to(getattr(torch, info.dtype), copy=True)
    if find_directory(config.path) is not None:  # of a model on the hub only the files asked for are fetched
        _check_layer_sizes(info, count_weight_bytes(config), where)
    return weights


def _check_layer_sizes(info: TargetInfo, stored_bytes: int, where: str) -> None:
    """A draft takes its layer's sizes from the target: refuse those of which one matrix outweighs the files."""
    widest = max(info.intermediate_size, info.num_attention_heads * info.head_dim)
    if info.hidden_size * widest > PARAMETERS_PER_BYTE * stored_bytes:
        raise TargetError(
            f"a layer of {info.hidden_size} by {widest} does not fit weight files of {stored_bytes:,} bytes",
            where=where,
            hint="the weights and config.json are of different models",
        )


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
                f"its logits are not lm_head times the hidden state ({key} is {shorten(text[key])})",
                where=f"{where}: {key}",
                hint="such targets cannot be trained against yet",
            )


def _is_tied(settings: Mapping[str, Any], where: str) -> bool:
    tied = language_section(settings).get("tie_word_embeddings", settings.get("tie_word_embeddings"))
    if tied is not None and type(tied) is not bool:
        raise TargetError(
            f"{shorten(tied)} is neither true nor false",
            where=f"{where}: tie_word_embeddings",
            hint="correct the file",
        )
    return bool(tied)


def count_weight_bytes(config: HfTargetConfig) -> int:
    """The size of all weight files together. A model on the hub is fetched for it.

    :raises TargetError: there are none, or one is missing.
    """
    files = _WeightFiles(config)
    return sum(files.locate(name).stat().st_size for name in files.names)


class _WeightFiles:
    """A model's safetensors files: one, or several behind an index."""

    def __init__(self, config: HfTargetConfig):
        self._config = config
        self._file_of: Mapping[str, str] | None = None
        self.names = {SINGLE_FILE}
        if locate_file(config.path, SINGLE_FILE, revision=config.revision) is not None:  # what transformers prefers
            return
        index = locate_file(config.path, INDEX_FILE, revision=config.revision)
        if index is None:
            raise TargetError(
                f"there is neither {SINGLE_FILE} nor {INDEX_FILE}",
                where=f"target {config.path}",
                hint="other weight formats are not read: load the model with transformers and save_pretrained it again",
            )
        self._file_of = _read_index(index)
        self.names = set(self._file_of.values())

    def read(self, name: str, shape: tuple[int, ...], *, tied: bool) -> Tensor:
        """The weight of that name. Its shape and kind are checked before it takes memory."""
        file_of = self._file_of or self._keys_of_one()
        key = _find_key(name, file_of)
        if key is None and name == LM_HEAD and tied:
            key = _find_key(EMBED_TOKENS, file_of)
        if key is None:
            raise TargetError(
                f"no tensor is its {name}",
                where=f"target {self._config.path}",
                hint="the files are incomplete, or the architecture is not understood",
            )
        if name == FINAL_NORM and key.removesuffix("weight") + "bias" in file_of:
            raise TargetError(
                "its final norm is a LayerNorm with a bias",
                where=f"target {self._config.path}",
                hint="let the strategy capture last_hidden_states after the norm (post)",
            )
        with self._open(file_of[key]) as file:
            stored = file.get_slice(key)
            if tuple(stored.get_shape()) != shape or stored.get_dtype() not in _FLOATS:
                raise TargetError(
                    f"{name} is {stored.get_dtype()} {shorten(stored.get_shape())}, but config.json says floats "
                    f"{list(shape)}",
                    where=f"target {self._config.path}: {file_of[key]}",
                    hint="the weights and config.json are of different models",
                )
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def locate(self, name: str) -> Path:
        path = locate_file(self._config.path, name, revision=self._config.revision)
        if path is None:
            raise TargetError("the file is missing", where=f"target {self._config.path}: {name}", hint="copy it again")
        return path

    def _keys_of_one(self) -> dict[str, str]:
        with self._open(SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.locate(name)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
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
    """Which file each weight is in, of files that are safetensors below the model's directory and nothing else."""
    files = read_model_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise TargetError("weight_map is not a table of file names", where=str(path), hint="copy it again")
    for key, name in files.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise TargetError(
                f"{shorten(name)} is not the name of a safetensors file of this model",
                where=f"{path}: weight_map: {shorten(key)}",
                hint="copy it again",
            )
    return files
