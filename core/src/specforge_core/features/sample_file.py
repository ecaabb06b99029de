# SPDX-License-Identifier: Apache-2.0
"""One sample as one safetensors file: what the file store writes and reads.

The format is public and small (a length, a JSON header, raw bytes), so it is written and read here directly: the bytes
go from the tensors to the file and back in one gathered system call each, and every length is checked before a tensor
is allocated. What is not a tensor (generation, prompt id, epoch, norm) is in the header's metadata, with a checksum of
the bytes: a disk that altered one must not train a draft on it.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from specforge_core.contracts import (
    DTYPE_BYTES,
    LAST_HIDDEN_STATES,
    FeatureCorrupt,
    FeatureSpec,
    Norm,
    Sample,
    StoreError,
)

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Buffer

_FORMAT = "1"
_MAX_HEADER_BYTES = 1 << 20
_MAX_VECTORS = 1024
_FILE_DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "uint8": "U8",
    "bool": "BOOL",
}
_NORMS: Mapping[str, Norm | None] = {"": None, "pre": "pre", "post": "post"}
_DTYPES = {name: dtype for dtype, name in _FILE_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class SampleHeader:
    """What a sample file says about itself; ``specs`` in the order of the bytes."""

    sample_id: str
    generation: int
    prompt_id: str
    epoch: int
    norm: Norm | None
    specs: tuple[FeatureSpec, ...]
    checksum: int
    data_start: int


def encode_sample(sample_id: str, sample: Sample, generation: int) -> list[memoryview]:
    """The file's content as buffers to be written one after the other; no tensor bytes are copied on CPU.

    :raises StoreError: a dtype that the file format has no name for.
    """
    # Widest elements first keeps every tensor aligned to its element size.
    specs = sorted(sample.specs(), key=lambda spec: (-DTYPE_BYTES.get(spec.dtype, 0), spec.name))
    entries: dict[str, Any] = {}
    end = 0
    for spec in specs:
        if spec.dtype not in _FILE_DTYPES:
            raise StoreError(f"feature {spec.name} is {spec.dtype}", where=sample_id, hint=f"use {list(_FILE_DTYPES)}")
        begin, end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": _FILE_DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    content = [raw_bytes(sample.features[spec.name].detach().to("cpu").contiguous()) for spec in specs]
    entries["__metadata__"] = _metadata(sample_id, sample, generation) | {"crc32": f"{_checksum(content):08x}"}
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return [memoryview(struct.pack("<Q", len(text)) + text), *content]


def _checksum(content: Sequence[memoryview]) -> int:
    checksum = 0
    for buffer in content:
        checksum = zlib.crc32(buffer, checksum)
    return checksum


def _metadata(sample_id: str, sample: Sample, generation: int) -> dict[str, str]:
    return {
        "specforge": _FORMAT,
        "sample_id": sample_id,
        "generation": str(generation),
        "prompt_id": sample.prompt_id,
        "epoch": str(sample.epoch),
        "norm": sample.last_hidden_norm or "",
    }


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, uncopied and writable."""
    return memoryview(cast("Buffer", tensor.reshape(-1).view(torch.uint8).numpy()))


def write_all(descriptor: int, buffers: Sequence[memoryview]) -> None:
    """Write every buffer, however many calls it takes."""
    rest = [buffer for buffer in buffers if buffer.nbytes]
    while rest:
        rest = _skip(rest, os.writev(descriptor, rest[:_MAX_VECTORS]))


def read_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill the buffers from ``offset`` on; returns how many bytes there were, fewer where the file ends early."""
    rest = [buffer for buffer in buffers if buffer.nbytes]
    total = 0
    while rest:
        count = os.preadv(descriptor, rest[:_MAX_VECTORS], offset + total)
        if count == 0:
            break
        total += count
        rest = _skip(rest, count)
    return total


def _skip(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What remains of ``buffers`` after their first ``count`` bytes."""
    for index, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[index + 1 :]]
        count -= buffer.nbytes
    return []


def read_header(descriptor: int, *, where: str) -> SampleHeader:
    """Read and check a sample file's header.

    :raises FeatureCorrupt: short, torn, or not a sample file.
    """
    size = os.fstat(descriptor).st_size
    first = os.pread(descriptor, 4096, 0)
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise FeatureCorrupt(f"{size} bytes that do not begin with a whole header", where=where, hint=_CAPTURE_AGAIN)
    text = first[8 : 8 + length]
    if len(text) < length:
        text += os.pread(descriptor, length - len(text), 8 + len(text))
    try:
        return _parse_header(json.loads(text), data_start=8 + length)
    except (ValueError, KeyError, TypeError) as error:
        raise FeatureCorrupt(f"malformed header: {error!r}", where=where, hint=_CAPTURE_AGAIN) from error


def check_length(descriptor: int, header: SampleHeader, *, where: str) -> None:
    """:raises FeatureCorrupt: the file is not exactly as long as its header says."""
    size = os.fstat(descriptor).st_size
    expected = header.data_start + sum(spec.nbytes for spec in header.specs)
    if size != expected:
        raise FeatureCorrupt(f"{size} bytes where the header says {expected}", where=where, hint=_CAPTURE_AGAIN)


def _parse_header(entries: dict[str, Any], *, data_start: int) -> SampleHeader:
    metadata: Mapping[str, str] = entries.pop("__metadata__")
    if metadata["specforge"] != _FORMAT:
        raise ValueError(f"sample format {metadata['specforge']}, this version reads {_FORMAT}")
    norm = _NORMS[metadata["norm"]]
    specs = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape} of {name}")
        spec = FeatureSpec(name, shape, _DTYPES[entry["dtype"]], norm if name == LAST_HIDDEN_STATES else None)
        if entry["data_offsets"] != [end, end + spec.nbytes]:
            raise ValueError(f"offsets of {name}")
        end += spec.nbytes
        specs.append(spec)
    return SampleHeader(
        sample_id=metadata["sample_id"],
        generation=int(metadata["generation"]),
        prompt_id=metadata["prompt_id"],
        epoch=int(metadata["epoch"]),
        norm=norm,
        specs=tuple(specs),
        checksum=int(metadata["crc32"], 16),
        data_start=data_start,
    )


def read_features(descriptor: int, header: SampleHeader, *, where: str) -> dict[str, Tensor]:
    """Read the tensors that ``header`` describes, each into memory of its own.

    :raises FeatureCorrupt: the file became shorter than its header says, or its bytes are not the ones written.
    """
    features = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in header.specs}
    content = [raw_bytes(tensor) for tensor in features.values()]
    count = read_all(descriptor, content, header.data_start)
    expected = sum(spec.nbytes for spec in header.specs)
    if count != expected:
        raise FeatureCorrupt(f"{count} bytes of tensors where {expected} belong", where=where, hint=_CAPTURE_AGAIN)
    if _checksum(content) != header.checksum:
        raise FeatureCorrupt("its bytes are not the ones that were written", where=where, hint=_CAPTURE_AGAIN)
    return {name: features[name] for name in sorted(features)}


_CAPTURE_AGAIN = "the file is damaged; remove the feature directory and run `specforge capture` again"
