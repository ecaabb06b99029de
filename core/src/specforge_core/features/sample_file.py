# SPDX-License-Identifier: Apache-2.0
"""One sample as one safetensors file: what the file store writes and reads.

The format is public and small (a length, a JSON header, raw bytes), so it is written and read here directly: the bytes
go from the tensors to the file and back uncopied, in pieces that are hashed (XXH3) while the cache holds them; every
length is checked before a tensor is allocated. What is not a tensor (generation, prompt id, epoch, norm) is in the
header's metadata, with a checksum of the bytes: a disk that altered one must not train a draft on it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_64

from specforge_core.contracts import (
    DTYPE_BYTES,
    LAST_HIDDEN_STATES,
    FeatureCorrupt,
    FeatureSpec,
    Norm,
    Sample,
    StoreError,
)
from specforge_core.contracts.records import is_plausible_shape
from specforge_core.features.owned_memory import empty_tensor
from specforge_core.features.pieces import cut, raw_bytes

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "2"
_MAX_HEADER_BYTES = 1 << 20
_MAX_VECTORS = 1024
_GENERATION_DIGITS = 19
MAX_GENERATION = 1 << 62
"""The highest that is read: a million puts a second would take a hundred thousand years to get there, and it can be
counted on from in 64 bits."""
_NO_CHECKSUM = "0" * len(xxh3_64().hexdigest())
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
    checksum: str
    data_start: int


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample about to be written. Its size is known before its generation and its checksum are.

    :param content: the tensors' memory, in the order of the file.
    """

    _entries: Mapping[str, Any]
    _metadata: Mapping[str, str]
    content: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self._header(0, _NO_CHECKSUM)) + sum(buffer.nbytes for buffer in self.content)

    def write(self, descriptor: int, generation: int) -> None:
        """Write the file; the header last, so that what a dead process left is never taken for a sample."""
        offset = len(self._header(generation, _NO_CHECKSUM))
        checksum = xxh3_64()
        for pieces in cut(self.content):
            offset = _write_all(descriptor, pieces, offset)
            for piece in pieces:
                checksum.update(piece)
        _write_all(descriptor, [memoryview(self._header(generation, checksum.hexdigest()))], 0)

    def _header(self, generation: int, checksum: str) -> bytes:
        numbered = {"generation": f"{generation:0{_GENERATION_DIGITS}d}", "checksum": checksum}
        entries = {**self._entries, "__metadata__": {**self._metadata, **numbered}}
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def encode_sample(sample_id: str, sample: Sample) -> EncodedSample:
    """The file's content; no tensor bytes are copied on CPU.

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
    metadata = {
        "specforge": _FORMAT,
        "sample_id": sample_id,
        "prompt_id": sample.prompt_id,
        "epoch": str(sample.epoch),
        "norm": sample.last_hidden_norm or "",
    }
    return EncodedSample(entries, metadata, content)


def _write_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Write every buffer from ``offset`` on, however many calls it takes; where the last one ends."""
    rest = [buffer for buffer in buffers if buffer.nbytes]
    while rest:
        count = os.pwritev(descriptor, rest[:_MAX_VECTORS], offset)
        rest, offset = _skip(rest, count), offset + count
    return offset


def _read_all(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
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
        return _parse_header(json.loads(text, object_pairs_hook=_without_duplicates), data_start=8 + length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FeatureCorrupt(f"malformed header: {error!r:.200}", where=where, hint=_CAPTURE_AGAIN) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key stands there twice")
    return entries


def check_length(descriptor: int, header: SampleHeader, *, where: str) -> None:
    """:raises FeatureCorrupt: the file is not exactly as long as its header says."""
    size = os.fstat(descriptor).st_size
    expected = header.data_start + sum(spec.nbytes for spec in header.specs)
    if size != expected:
        raise FeatureCorrupt(f"{size} bytes where the header says {expected}", where=where, hint=_CAPTURE_AGAIN)


def _parse_header(entries: Any, *, data_start: int) -> SampleHeader:
    """:raises ValueError: not a sample's header (or KeyError or TypeError)."""
    if type(entries) is not dict:
        raise ValueError("it is no table")
    metadata = entries.pop("__metadata__")
    if type(metadata) is not dict or {*map(type, metadata.values())} != {str}:
        raise ValueError("its metadata is no table of texts")
    if metadata["specforge"] != _FORMAT:
        raise ValueError(f"sample format {metadata['specforge']}, this version reads {_FORMAT}")
    norm = _NORMS[metadata["norm"]]
    specs = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        spec = FeatureSpec(name, _shape(entry["shape"]), _DTYPES[entry["dtype"]], norm if _has_norm(name) else None)
        begin, after = entry["data_offsets"]
        if (type(begin), type(after), begin, after) != (int, int, end, end + spec.nbytes):
            raise ValueError(f"offsets of {name}")
        end += spec.nbytes
        specs.append(spec)
    return SampleHeader(
        sample_id=metadata["sample_id"],
        generation=_count(metadata["generation"]),
        prompt_id=metadata["prompt_id"],
        epoch=_count(metadata["epoch"]),
        norm=norm,
        specs=tuple(specs),
        checksum=metadata["checksum"],
        data_start=data_start,
    )


def _has_norm(name: str) -> bool:
    return name == LAST_HIDDEN_STATES


def _shape(dimensions: Any) -> tuple[int, ...]:
    if type(dimensions) is not list or not is_plausible_shape(dimensions):
        raise ValueError(f"the shape {dimensions!r:.80}")
    return tuple(dimensions)


def _count(text: str) -> int:
    """A number as ``encode_sample`` writes it: digits, no sign, no underscore."""
    count = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= count <= MAX_GENERATION:
        raise ValueError(f"the count {text!r:.80}")
    return count


def read_features(descriptor: int, header: SampleHeader, *, where: str) -> dict[str, Tensor]:
    """Read the tensors that ``header`` describes, each into memory of its own.

    :raises FeatureCorrupt: the file became shorter than its header says, or its bytes are not the ones written.
    """
    features = {spec.name: empty_tensor(spec) for spec in header.specs}
    checksum = xxh3_64()
    count = 0
    for pieces in cut([raw_bytes(tensor) for tensor in features.values()]):
        count += _read_all(descriptor, pieces, header.data_start + count)
        for piece in pieces:
            checksum.update(piece)
    expected = sum(spec.nbytes for spec in header.specs)
    if count != expected:
        raise FeatureCorrupt(f"{count} bytes of tensors where {expected} belong", where=where, hint=_CAPTURE_AGAIN)
    if checksum.hexdigest() != header.checksum:
        raise FeatureCorrupt("its bytes are not the ones that were written", where=where, hint=_CAPTURE_AGAIN)
    return {name: features[name] for name in sorted(features)}


_CAPTURE_AGAIN = "the file is damaged; remove the feature directory and run `specforge capture` again"
