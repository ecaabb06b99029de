# SPDX-License-Identifier: Apache-2.0
"""What ranks exchange. A rank is a process with a share of each window; one process is the plain case.

Ranks exchange sums only: denominators before the first backward, gradients once per window, metrics after it. So the
number of ranks decides how a window is cut and nothing else.

Sharded drafts fit here as a third kind: ``prepare`` shards, gradients then arrive summed with the backward pass, and
``sum_gradients`` has nothing left to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from torch import nn


class Parallelism(Protocol):
    """The seam between training and the number of processes it runs on."""

    rank: int
    world_size: int

    def prepare(self, draft: nn.Module) -> None:
        """Make every rank begin with the same draft; call once, before the optimizer is constructed."""
        ...

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Add up gradients over ranks, in place."""
        ...

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Add up named numbers over ranks; a rank may lack names that others have."""
        ...

    def agree(self, flag: bool) -> bool:
        """True where any rank says so."""
        ...

    def close(self) -> None:
        """Leave the other ranks. Idempotent."""
        ...


class SingleProcess:
    """No other ranks: every sum is what it already is."""

    rank = 0
    world_size = 1

    def prepare(self, draft: nn.Module) -> None:
        pass

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        pass

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        return dict(counts)

    def agree(self, flag: bool) -> bool:
        return flag

    def close(self) -> None:
        pass


class DataParallel:
    """Every rank holds the whole draft; gradients are summed once per window.

    :param backend: ``gloo`` on CPU, ``nccl`` on GPUs.
    :param init_method: where ranks meet (``tcp://host:port`` or ``file:///path``).
    :param device: where this rank computes.
    """

    def __init__(
        self, rank: int, *, world_size: int, backend: str, init_method: str, device: str, timeout_seconds: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = torch.device(device)
        dist.init_process_group(
            backend,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    def prepare(self, draft: nn.Module) -> None:
        for tensor in draft.state_dict().values():
            dist.broadcast(tensor, src=0)

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        pending = [dist.all_reduce(gradient, op=dist.ReduceOp.SUM, async_op=True) for gradient in gradients]
        for work in pending:
            work.wait()

    def sum_counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        # names may differ between ranks (a rank can be without samples), so names travel too; JSON keeps every bit of
        # a float, and adding in rank order gives every rank the same bits
        mine = torch.frombuffer(bytearray(json.dumps(dict(counts)).encode()), dtype=torch.uint8).to(self._device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()], device=self._device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: mine.numel()] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        total: dict[str, float] = {}
        for size, text in zip(sizes, gathered, strict=True):
            for name, value in json.loads(bytes(text[: int(size)].cpu().tolist())).items():
                total[name] = total.get(name, 0.0) + value
        return total

    def agree(self, flag: bool) -> bool:
        votes = torch.tensor([int(flag)], device=self._device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
