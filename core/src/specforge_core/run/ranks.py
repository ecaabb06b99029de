# SPDX-License-Identifier: Apache-2.0
"""Training on several ranks: what torchrun put into the environment, and the group it makes of the processes."""

from __future__ import annotations

import os

import torch

from specforge_core.contracts import ConfigError
from specforge_core.training.parallelism import DataParallel, Parallelism, SingleProcess


def join_ranks(*, device: str, timeout_seconds: float) -> Parallelism:
    """The other ranks of this run, as torchrun names them; alone where nothing does.

    :raises ConfigError: an environment that says half of it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return SingleProcess()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set",
            where="environment",
            hint="start ranks with torchrun --standalone --nproc-per-node N -m specforge_core.cli.main train RUN",
        )
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return DataParallel(
        int(os.environ["RANK"]),
        world_size=world_size,
        backend="nccl" if device.startswith("cuda") else "gloo",
        init_method="env://",
        device=device,
        timeout_seconds=timeout_seconds,
    )
