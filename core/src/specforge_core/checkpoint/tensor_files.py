# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint on disk, in the format of ``torch.distributed.checkpoint``.

That format can be read by another number of ranks than wrote it. Its index is a pickle, so it is read with an
unpickler that knows the index's own classes and nothing else; tensors are read with ``weights_only``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from specforge_core.checkpoint.layout import damaged
from specforge_core.contracts import CheckpointError

WRITE_ERRORS = (OSError, RuntimeError, CheckpointException)
"""What writing can raise where the disk is full or not writable."""

_INDEX = ".metadata"
_KNOWN_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
_KNOWN_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}


class _IndexUnpickler(pickle.Unpickler):
    """Resolves the classes an index is made of; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        known = (
            (module, name) in _KNOWN_NAMES
            or (module in ("pathlib", "pathlib._local") and name in _KNOWN_PATHS)
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        )
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """The standard reader, with the index read safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / _INDEX, "rb") as handle:
            metadata: Metadata = _IndexUnpickler(handle).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors into a new directory. Raises one of ``WRITE_ERRORS``."""
    directory.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process writes, on purpose
        save(dict(tensors), storage_writer=FileSystemWriter(directory), no_dist=True)


def read_tensors(directory: Path, into: Mapping[str, Tensor], *, prefixes: tuple[str, ...]) -> None:
    """Fill ``into`` in place (converting dtypes) with the stored tensors whose names begin with one of ``prefixes``.

    :raises CheckpointError: names or shapes differ, or the files cannot be read.
    """
    reader = _Reader(directory)
    index = directory / _INDEX
    try:
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise damaged(index, str(error)) from error
    shapes = {
        name: tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith(prefixes) and isinstance(entry, TensorStorageMetadata)
    }
    _check_shapes(directory, stored=shapes, wanted={name: tuple(tensor.shape) for name, tensor in into.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(dict(into), storage_reader=reader, no_dist=True)
        except (*WRITE_ERRORS, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise damaged(directory, str(error).splitlines()[0]) from error


def _check_shapes(
    directory: Path, *, stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
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
