# SPDX-License-Identifier: Apache-2.0
"""An export as somebody else may have made it. Stage 8 backwards: ``config.json`` and weights to a draft.

Nothing they say is believed before it was checked: fields against a table of kinds, sizes against the target, stored
tensors against the draft that follows from both, laid out without memory. Only then is a draft built, so that a small
file that claims sizes no machine has costs nothing.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from specforge_core.contracts import ConfigError, ExportError, TargetInfo
from specforge_core.contracts.files import open_regular, read_json_object
from specforge_core.contracts.kinds import OBJECT, Kind, find_wrong, list_of, number, shorten, whole_number

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_SIZE = 1 << 24
"""The largest size of a layer or vocabulary that is believed: a hundred times today's, and products of two of them by a
number of layers still count their bytes in 63 bits."""
MAX_LAYERS = 1024
"""The most layers that are believed: several times those of the deepest model."""

_HINT = "export the draft again"
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHERS = {"BOOL": torch.bool, "I64": torch.int64}

Draft = TypeVar("Draft", bound=nn.Module)


SIZE = whole_number(1, MAX_SIZE)
LAYER_COUNT = whole_number(1, MAX_LAYERS)
LAYER_IDS = list_of(whole_number(0, MAX_LAYERS), least=1, most=MAX_LAYERS)
OUTPUT_IDS = list_of(whole_number(1, MAX_LAYERS), least=1, most=MAX_LAYERS)
"""Captured layers counted from one, where 0 is the embedding."""

LAYER_FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "target_hidden_size", "intermediate_size"), SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), SIZE),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), OBJECT),
    "rms_norm_eps": number(1e-12, 1.0),
}
"""The fields of a transformer layer that every draft has, in the words of ``config.json``. What rotates it is checked
where it is computed (:mod:`specforge_core.modeling.rotary`)."""


class Fields(dict[str, Any]):
    """Fields of an export whose kinds were checked; null counts as left out, and taking what is missing says so."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__({key: value for key, value in values.items() if value is not None})
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise ExportError(f"the field {key!r} is missing", where=self.where, hint=_HINT)


class DraftSizes(Protocol):
    """What every draft's shape says."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def target_hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_aux(self) -> int: ...


def write_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """``config.json`` and ``model.safetensors``."""
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(stored, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read_config(directory: Path) -> dict[str, Any]:
    """What ``config.json`` holds, unchecked.

    :raises ExportError: there is none, or it is not a JSON object.
    """
    path = directory / CONFIG_FILE
    return read_json_object(_resolve(path), refuse=lambda reason: ExportError(reason, where=str(path), hint=_HINT))


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Kind], directory: Path) -> Fields:
    """The fields of an export's ``config.json``, those in ``kinds`` checked; the others are nobody's business.

    :raises ExportError: a field is of another kind.
    """
    where = str(directory / CONFIG_FILE)
    fields = Fields(values, where)
    wrong = find_wrong(fields, kinds)
    if wrong is not None:
        key, reason = wrong
        raise ExportError(reason, where=f"{where}: {key}", hint=_HINT)
    return fields


def check_sizes(shape: DraftSizes, target: TargetInfo, directory: Path) -> None:
    """:raises ExportError: the draft is for another target, or its heads do not divide what they should."""
    where = str(directory / CONFIG_FILE)
    own = (shape.vocab_size, shape.hidden_size, shape.target_hidden_size)
    if own != (target.vocab_size, target.hidden_size, target.hidden_size):
        raise ExportError(
            f"the draft is for a vocabulary of {own[0]} and hidden sizes of {own[1]} and {own[2]}, "
            f"the target has {target.vocab_size} and {target.hidden_size}",
            where=where,
            hint="use the target it was trained with",
        )
    heads, width = shape.num_attention_heads, shape.head_dim
    if heads % shape.num_key_value_heads:
        reason, key = f"{shape.num_key_value_heads} does not divide {heads} heads", "num_key_value_heads"
    elif width < 1 or width % 2:
        reason, key = f"heads of size {width} cannot be rotated by halves", "head_dim"
    elif heads * width > MAX_SIZE:
        reason, key = f"{heads} heads of size {width} are too many", "head_dim"
    else:
        return
    raise ExportError(reason, where=f"{where}: {key}", hint=_HINT)


def check_captured(shape: DraftSizes, layers: Sequence[int], directory: Path) -> None:
    """:raises ExportError: the draft joins another number of layers than this run captures."""
    if shape.num_aux != len(layers):
        raise ExportError(
            f"the draft reads {shape.num_aux} captured layers, strategy.aux_layer_ids gives {len(layers)}",
            where=str(directory / CONFIG_FILE),
            hint="set strategy.aux_layer_ids to the layers it was trained with",
        )


def read_draft(
    build: Callable[[], Draft],
    directory: Path,
    *,
    rename: Callable[[str], str] = str,
    may_lack: Collection[str] = (),
) -> Draft:
    """The draft that ``build`` makes, with the stored weights, in the widest dtype among them.

    :param build: called twice: once without memory for the tensors, and again when the files are known to fill them.
    :param rename: from a stored tensor's name to the draft's.
    :param may_lack: tensors that keep what ``build`` gave them where they are not stored.
    :raises ExportError: ``config.json`` asks for what is not implemented; weights are missing, of another shape or
        kind, not finite, or not readable.
    """
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except ConfigError as error:
        raise ExportError(error.message, where=f"{directory / CONFIG_FILE}: {error.where}", hint=_HINT) from error
    path = directory / WEIGHTS_FILE
    tensors = _read_tensors(path, expected, rename=rename, may_lack=may_lack)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist())):
            raise ExportError(f"the weight {name} has numbers that are not finite", where=str(path), hint=_HINT)
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    draft = build().to(functools.reduce(torch.promote_types, floats))
    draft.load_state_dict({**draft.state_dict(), **tensors})
    return draft


def _read_tensors(
    path: Path, expected: Mapping[str, Tensor], *, rename: Callable[[str], str], may_lack: Collection[str]
) -> dict[str, Tensor]:
    """The stored tensors that are expected. The file's header is checked for all of them before one is read."""
    resolved = _resolve(path)
    try:
        os.close(open_regular(resolved, os.O_RDONLY))  # what opens it below would wait for a pipe
        with safe_open(resolved, "pt") as stored:
            names = {rename(name): name for name in stored.keys()}  # noqa: SIM118
            absent = [name for name in expected if name not in names and name not in may_lack]
            if absent:
                raise ExportError(f"the weight {absent[0]} is missing", where=str(path), hint=_HINT)
            wanted = [name for name in expected if name in names]
            for name in wanted:
                _check_stored(stored.get_slice(names[name]), name, expected=expected[name], path=path)
            return {name: stored.get_tensor(names[name]) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ExportError(f"unreadable weights: {error}", where=str(path), hint=_HINT) from error


def _check_stored(stored: Any, name: str, *, expected: Tensor, path: Path) -> None:
    kinds, shape = _FLOATS if expected.is_floating_point() else _OTHERS, list(stored.get_shape())
    if shape != list(expected.shape):
        reason = f"the weight {name} is {shorten(shape)}, expected {list(expected.shape)}"
    elif stored.get_dtype() not in kinds or (kinds is _OTHERS and kinds[stored.get_dtype()] != expected.dtype):
        floats = " or ".join(_FLOATS) if kinds is _FLOATS else str(expected.dtype).removeprefix("torch.")
        reason = f"the weight {name} holds {stored.get_dtype()}, expected {floats}"
    else:
        return
    raise ExportError(reason, where=str(path), hint=_HINT)


def _resolve(path: Path) -> Path:
    """The file itself: where exports are downloaded to, their files are often links into a cache.

    :raises ExportError: there is none.
    """
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a link to itself is a RuntimeError before Python 3.13
        raise ExportError(
            "no such file", where=str(path), hint="an export holds config.json and model.safetensors"
        ) from error
