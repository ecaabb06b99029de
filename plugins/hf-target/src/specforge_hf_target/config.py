# SPDX-License-Identifier: Apache-2.0
"""The ``target: {name: hf}`` section, and what a model's ``config.json`` says about it.

Read by ``specforge plan``, so describing a target imports neither torch nor transformers: the file is read as JSON.
Files written by transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``dtype``) are both understood, and so are multimodal ones that keep the language model under ``text_config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from specforge_core import TargetEngineConfig
from specforge_core.contracts import TargetError, TargetInfo

from specforge_hf_target.model_files import locate_file

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Json = Mapping[str, Any]

_DTYPES = ("float32", "bfloat16", "float16")


class HfTargetConfig(TargetEngineConfig):
    """A causal language model in a local directory or on the model hub."""

    path: str = Field(min_length=1, description="model directory, or a hub id such as owner/model")
    revision: str | None = Field(None, description="hub only: branch, tag or commit")
    dtype: Dtype = Field("auto", description="auto: what config.json says")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    attn_implementation: str | None = Field(None, description="transformers' attention; default: its own choice")

    def widens_trust(self) -> Mapping[str, str]:
        asked = {}
        if self.trust_remote_code:
            asked["trust_remote_code"] = f"run Python code that came with its target {self.path}"
        if self.attn_implementation is not None and "/" in self.attn_implementation:
            asked["attn_implementation"] = f"run {self.attn_implementation}, code from the hub"
        if not Path(self.path).expanduser().is_dir():
            asked["path"] = f"fetch {self.path} from the hub"
            if self.revision is not None:
                asked["revision"] = f"use revision {self.revision} of it"
        return asked

    def describe(self) -> TargetInfo:
        """The target as its ``config.json`` describes it.

        :raises TargetError: no such model, or a configuration that is not a decoder's.
        """
        where, config = self.read_config()
        text = language_section(config)
        heads = _integer(text, "num_attention_heads", "n_head", where=where)
        hidden = _integer(text, "hidden_size", "n_embd", where=where)
        return TargetInfo(
            name_or_path=self.path,
            architecture=_architecture(config, where),
            num_layers=_integer(text, "num_hidden_layers", "n_layer", where=where),
            hidden_size=hidden,
            vocab_size=_integer(text, "vocab_size", where=where),
            dtype=self._resolve_dtype(config, text, where),
            intermediate_size=_integer(text, "intermediate_size", "n_inner", default=4 * hidden, where=where),
            num_attention_heads=heads,
            num_key_value_heads=_integer(text, "num_key_value_heads", default=heads, where=where),
            head_dim=_integer(text, "head_dim", default=hidden // heads, where=where),
            rms_norm_eps=_number(text, "rms_norm_eps", "layer_norm_epsilon", default=1e-6, where=where),
            max_position_embeddings=_integer(text, "max_position_embeddings", "n_positions", default=2048, where=where),
            rope_parameters=_rope_parameters(text, where),
            bos_token_id=_first(_token_ids(text.get("bos_token_id", config.get("bos_token_id")), where)),
            eos_token_ids=self._eos_token_ids(config, text),
        )

    def read_config(self) -> tuple[str, Json]:
        """Where ``config.json`` is and what it holds.

        :raises TargetError: there is none, or it is not JSON.
        """
        path = locate_file(self.path, "config.json", revision=self.revision)
        if path is None:
            raise TargetError(
                "there is no config.json",
                where=f"target.path {self.path}",
                hint="name the directory that save_pretrained wrote, or a hub id",
            )
        return str(path), _read_json(path)

    def _resolve_dtype(self, config: Json, text: Json, where: str) -> str:
        if self.dtype != "auto":
            return self.dtype
        named = (text.get("dtype"), text.get("torch_dtype"), config.get("dtype"), config.get("torch_dtype"))
        found = _first([str(name).removeprefix("torch.") for name in named if name]) or "float32"
        if found not in _DTYPES:
            raise TargetError(
                f"the model's dtype is {found!r}", where=where, hint=f"set target.dtype to one of {', '.join(_DTYPES)}"
            )
        return found

    def _eos_token_ids(self, config: Json, text: Json) -> tuple[int, ...]:
        """Every id that ends a sequence; generation_config.json knows more of them (chat turns) than config.json."""
        path = locate_file(self.path, "generation_config.json", revision=self.revision)
        if path is not None:
            ids = _token_ids(_read_json(path).get("eos_token_id"), str(path))
            if ids:
                return ids
        return _token_ids(text.get("eos_token_id", config.get("eos_token_id")), self.path)


def language_section(config: Json) -> Json:
    """The part of a configuration that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "num_hidden_layers" in nested else config


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TargetError(f"not readable as JSON: {error}", where=str(path), hint="copy the model again") from error
    if not isinstance(value, dict):
        raise TargetError("not a JSON object", where=str(path), hint="copy the model again")
    return value


def _architecture(config: Json, where: str) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise TargetError(
            "names no architecture",
            where=f"{where}: architectures",
            hint="a causal language model's config.json has it",
        )
    if config.get("is_encoder_decoder"):
        raise TargetError(f"{name} is an encoder-decoder", where=where, hint="targets are decoder-only language models")
    return name


def _integer(config: Json, *names: str, where: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TargetError(f"{value!r} is not a positive integer", where=f"{where}: {name}", hint="correct the file")
        return value
    if default is None:
        raise TargetError(
            f"{names[0]} is missing", where=where, hint="only decoder-only language models can be targets"
        )
    return default


def _number(config: Json, *names: str, where: str, default: float) -> float:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TargetError(f"{value!r} is not a number", where=f"{where}: {name}", hint="correct the file")
        return float(value)
    return default


def _rope_parameters(text: Json, where: str) -> dict[str, Any]:
    """RoPE as transformers 5 writes it, from either version's keys. Per-layer-type tables give their full attention."""
    given = text.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise TargetError("is not an object", where=f"{where}: rope_parameters", hint="correct the file")
    rope = dict(given)
    if isinstance(rope.get("full_attention"), Mapping):
        rope = dict(rope["full_attention"])
    scaling = text.get("rope_scaling")
    if isinstance(scaling, Mapping):
        rope = {**scaling, **rope}
    if "type" in rope:  # transformers before 4.43
        rope.setdefault("rope_type", rope.pop("type"))
        rope.pop("type", None)
    if text.get("rope_theta") is not None:
        rope.setdefault("rope_theta", text["rope_theta"])
    if rope:
        rope.setdefault("rope_type", "default")
    return {key: value for key, value in rope.items() if isinstance(value, (int, float, str, list))}


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise TargetError(f"token ids are {value!r}", where=where, hint="an integer or a list of integers belongs here")
    return tuple(ids)


def _first(values: Any) -> Any:
    return values[0] if values else None
