# SPDX-License-Identifier: Apache-2.0
"""The ``target: {name: hf}`` section, and what a model's ``config.json`` says about it.

Read by ``specforge plan``, so describing a target imports neither torch nor transformers: the file is read as JSON.
Files written by transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``dtype``) are both understood, and so are multimodal ones that keep the language model under ``text_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from specforge_core import TargetEngineConfig
from specforge_core.contracts import TargetError, TargetInfo
from specforge_core.contracts.kinds import shorten

from specforge_hf_target.model_files import local_directory, locate_file, read_model_json

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Json = Mapping[str, Any]

MAX_COUNT = 1 << 16
"""More layers, heads, experts or labels than any model has. transformers makes an object of each, before it has looked
at a weight."""
MAX_SIZE = 1 << 24
"""A larger size of a layer, vocabulary or context than any model has; products of two count their bytes in 63 bits."""
MAX_ROPE = 1e12
"""Beyond every base, factor and context of a RoPE; angles stay numbers in fp32."""
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
        if not local_directory(self.path).is_dir():
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
            rms_norm_eps=_epsilon(text, "rms_norm_eps", "layer_norm_epsilon", default=1e-6, where=where),
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
        config = read_model_json(path)
        for section in (config, language_section(config)):
            _check_foreign_keys(section, str(path))
        return str(path), config

    def _resolve_dtype(self, config: Json, text: Json, where: str) -> str:
        if self.dtype != "auto":
            return self.dtype
        named = (text.get("dtype"), text.get("torch_dtype"), config.get("dtype"), config.get("torch_dtype"))
        found = _first([name for name in named if name]) or "float32"
        if not isinstance(found, str) or found.removeprefix("torch.") not in _DTYPES:
            raise TargetError(
                f"the model's dtype is {shorten(found)}",
                where=where,
                hint=f"set target.dtype to one of {', '.join(_DTYPES)}",
            )
        return found.removeprefix("torch.")

    def _eos_token_ids(self, config: Json, text: Json) -> tuple[int, ...]:
        """Every id that ends a sequence; generation_config.json knows more of them (chat turns) than config.json."""
        path = locate_file(self.path, "generation_config.json", revision=self.revision)
        if path is not None:
            ids = _token_ids(read_model_json(path).get("eos_token_id"), str(path))
            if ids:
                return ids
        return _token_ids(text.get("eos_token_id", config.get("eos_token_id")), self.path)


def language_section(config: Json) -> Json:
    """The part of a configuration that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "num_hidden_layers" in nested else config


def _check_foreign_keys(config: Json, where: str) -> None:
    """Keys that nothing here reads, but transformers does, and acts on without a check of its own.

    :raises TargetError: the file asks for code or weights from elsewhere, or counts what no model has.
    """
    for key in ("attn_implementation", "_attn_implementation", "transformers_weights"):
        value = config.get(key)
        # A name with a slash is a kernel on the hub: code. The third key names a file of weights of any format.
        if value is not None and (key == "transformers_weights" or not isinstance(value, str) or "/" in value):
            raise _wrong(value, "asks for code or weights from elsewhere", f"{where}: {key}", hint="remove the key")
    for key, value in config.items():
        if key.startswith("num_") and type(value) is int and value > MAX_COUNT:
            raise _wrong(value, f"is more than {MAX_COUNT}", f"{where}: {key}")


def _wrong(value: object, reason: str, where: str, *, hint: str = "correct the file") -> TargetError:
    return TargetError(f"{shorten(value)} {reason}", where=where, hint=hint)


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
        if type(value) is not int or value < 1:
            raise _wrong(value, "is not a positive integer", f"{where}: {name}")
        if value > MAX_SIZE:
            raise _wrong(value, f"is more than {MAX_SIZE}", f"{where}: {name}")
        return value
    if default is None:
        raise TargetError(
            f"{names[0]} is missing", where=where, hint="only decoder-only language models can be targets"
        )
    return default


def _epsilon(config: Json, *names: str, where: str, default: float) -> float:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise _wrong(value, "is not a number above 0, at most 1", f"{where}: {name}")
        return float(value)
    return default


def _rope_parameters(text: Json, where: str) -> dict[str, Any]:
    """RoPE as transformers 5 writes it, from either version's keys. Per-layer-type tables give their full attention."""
    for key in ("rope_parameters", "rope_scaling"):
        if text.get(key) and not isinstance(text[key], Mapping):
            raise _wrong(text[key], "is not an object", f"{where}: {key}")
    rope = dict(text.get("rope_parameters") or {})
    if isinstance(rope.get("full_attention"), Mapping):
        rope = dict(rope["full_attention"])
    rope = {**(text.get("rope_scaling") or {}), **rope}
    if "type" in rope:  # transformers before 4.43
        rope.setdefault("rope_type", rope.pop("type"))
        rope.pop("type", None)
    if text.get("rope_theta") is not None:
        rope.setdefault("rope_theta", text["rope_theta"])
    if rope:
        rope.setdefault("rope_type", "default")
        _check_rope(rope, where)
    return {key: value for key, value in rope.items() if isinstance(value, (int, float, str, list))}


def _check_rope(rope: Json, where: str) -> None:
    if not isinstance(rope["rope_type"], str):
        raise _wrong(rope["rope_type"], "is not the name of a RoPE type", f"{where}: rope_parameters")
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = rope.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < MAX_ROPE):
            raise _wrong(value, f"is not a number above 0, below {MAX_ROPE:g}", f"{where}: rope_parameters.{key}")


def _token_ids(value: object, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise TargetError(
            f"token ids are {shorten(value)}", where=where, hint="an integer or a list of integers belongs here"
        )
    return tuple(ids)


def _first(values: Any) -> Any:
    return values[0] if values else None
