# SPDX-License-Identifier: Apache-2.0
"""Memory for tensors that are about to be filled: big ones on huge pages where the machine has them.

Filling fresh memory costs a page fault for each of its pages, which for small pages is more than the copying. The
memory is the tensor's own, and goes back to the machine when the tensor goes.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from specforge_core.contracts import FeatureSpec

_BIG_BYTES = 4 << 20  # two huge pages


def empty_tensor(spec: FeatureSpec) -> Tensor:
    """An uninitialised CPU tensor of the spec's shape and dtype."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.nbytes < _BIG_BYTES:
        return torch.empty(spec.shape, dtype=dtype)
    memory = mmap.mmap(-1, spec.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(spec.shape)
