# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint on disk: shards in safetensors, and an index in JSON that says what lies where.

::

    index.json                 {"format", "tensors": {name: {"dtype", "shape", "chunks": [{"shard", "at", "shape"}]}}}
    shard-00000.safetensors    chunks of tensors, each under its tensor's name

A chunk is the part of a tensor that begins at offset ``at`` (one number per dimension). One process writes one shard of
whole tensors; ranks that each hold a part write a shard each, and any number of ranks can read them. Both formats hold
numbers and names only, so reading what somebody else wrote runs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specforge_core.checkpoint.layout import INDEX, damaged, read_json, write_json
from specforge_core.contracts import CheckpointError

WRITE_ERRORS = (OSError, SafetensorError)
"""What writing can raise where the disk is full or not writable."""

_FORMAT = 1
_SHARD = re.compile(r"shard-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of one tensor: where it begins in the tensor, its shape, and the shard that holds it."""

    shard: str
    at: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(begin, begin + size) for begin, size in zip(self.at, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as the index describes it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[_Chunk, ...]


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, whole, into a new directory. Raises one of ``WRITE_ERRORS``."""
    directory.mkdir()
    shard = "shard-00000.safetensors"
    index = {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "chunks": [{"shard": shard, "at": [0] * tensor.dim(), "shape": list(tensor.shape)}],
        }
        for name, tensor in tensors.items()
    }
    save_file(_separate(tensors), directory / shard)
    write_json(directory / INDEX, {"format": _FORMAT, "tensors": index})


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On CPU, contiguous; tensors that share memory (tied weights) each with memory of its own, as the format wants."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        written = tensor.detach().to("cpu").contiguous()
        address = written.untyped_storage().data_ptr()
        separate[name] = written.clone() if address in seen else written
        seen.add(address)
    return separate


def read_tensors(directory: Path, into: Mapping[str, Tensor], *, prefixes: tuple[str, ...]) -> None:
    """Fill ``into`` in place (converting dtypes) with the stored tensors whose names begin with one of ``prefixes``.

    :raises CheckpointError: names or shapes differ, or the files cannot be read.
    """
    stored = {name: tensor for name, tensor in _read_index(directory / INDEX).items() if name.startswith(prefixes)}
    _check_shapes(
        directory,
        stored={name: tensor.shape for name, tensor in stored.items()},
        wanted={name: tuple(tensor.shape) for name, tensor in into.items()},
    )
    for name, tensor in stored.items():
        _check_cover(directory / INDEX, name, tensor)
    shards: dict[str, list[tuple[str, _Chunk]]] = {}
    for name, tensor in stored.items():
        for chunk in tensor.chunks:
            shards.setdefault(chunk.shard, []).append((name, chunk))
    for shard, chunks in sorted(shards.items()):
        _read_shard(directory / shard, chunks, stored=stored, into=into)


@torch.no_grad()
def _read_shard(
    path: Path, chunks: Sequence[tuple[str, _Chunk]], *, stored: Mapping[str, _Stored], into: Mapping[str, Tensor]
) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name, chunk in chunks:
                into[name][chunk.place].copy_(_read_chunk(file, name, chunk, dtype=stored[name].dtype))
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _read_chunk(file: Any, name: str, chunk: _Chunk, *, dtype: str) -> Tensor:
    """:raises ValueError: it is not what the index says."""
    if tuple(file.get_slice(name).get_shape()) != chunk.shape:
        raise ValueError(f"{name} is {file.get_slice(name).get_shape()}, the index says {list(chunk.shape)}")
    found: Tensor = file.get_tensor(name)
    if str(found.dtype).removeprefix("torch.") != dtype:
        raise ValueError(f"{name} is {found.dtype}, the index says {dtype}")
    return found


def _read_index(path: Path) -> dict[str, _Stored]:
    """:raises CheckpointError: it is not an index of this format."""
    index = read_json(path)
    if index.get("format") != _FORMAT or not isinstance(index.get("tensors"), dict):
        raise damaged(path, f"not an index of format {_FORMAT}")
    try:
        return {name: _parse_tensor(entry) for name, entry in index["tensors"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"malformed entry: {error!r}") from error


def _parse_tensor(entry: Mapping[str, Any]) -> _Stored:
    """:raises ValueError: not an entry of an index (or KeyError, TypeError)."""
    chunks = []
    for chunk in entry["chunks"]:
        if not isinstance(chunk["shard"], str) or not _SHARD.fullmatch(chunk["shard"]):
            raise ValueError(f"{chunk['shard']!r} is no shard")
        chunks.append(_Chunk(chunk["shard"], _sizes(chunk["at"]), _sizes(chunk["shape"])))
    if not isinstance(entry["dtype"], str):
        raise ValueError("dtype is no text")
    return _Stored(entry["dtype"], _sizes(entry["shape"]), tuple(chunks))


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{value!r:.80} are no sizes")
    return tuple(value)


def _check_cover(path: Path, name: str, tensor: _Stored) -> None:
    """:raises CheckpointError: the chunks of a tensor are not exactly the tensor."""
    inside = all(
        len(chunk.at) == len(chunk.shape) == len(tensor.shape)
        and all(at + size <= whole for at, size, whole in zip(chunk.at, chunk.shape, tensor.shape, strict=True))
        for chunk in tensor.chunks
    )
    if not inside or sum(chunk.numel for chunk in tensor.chunks) != math.prod(tensor.shape):
        raise damaged(path, f"the chunks of {name} are not the whole of it")
    if len(tensor.chunks) == 1:
        return
    covered = torch.zeros(tensor.shape, dtype=torch.bool)  # comparing each with each takes hours where they are many
    for chunk in tensor.chunks:
        covered[chunk.place] = True
    if not covered.all():
        raise damaged(path, f"the chunks of {name} overlap")


def _check_shapes(directory: Path, *, stored: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]]) -> None:
    differences = [
        f"{name}: checkpoint {list(stored[name]) if name in stored else 'nothing'}, "
        f"draft {list(wanted[name]) if name in wanted else 'nothing'}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if differences:
        shown = "\n".join(f"  - {line}" for line in differences[:10])
        more = f"\n  and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointError(
            f"the checkpoint is of another draft:\n{shown}{more}",
            where=str(directory.parent),
            hint="use the strategy settings, target and training data the checkpoint was trained with",
        )
