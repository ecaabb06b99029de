# SPDX-License-Identifier: Apache-2.0
"""What a run asks of the machine it runs on: so many CPU threads, and a device that is really there."""

from __future__ import annotations

import torch

from specforge_core.contracts import ConfigError


def set_threads(count: int | None) -> None:
    """How many CPU threads this process computes with; None leaves torch's choice."""
    if count is not None:
        torch.set_num_threads(count)


def check_device(device: str) -> None:
    """Use the device of ``training.device`` once, before anything is done that would be lost without it.

    :raises ConfigError: this machine, or this torch, does not have it.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device {device!r} cannot be used: {reason}", where="training.device", hint="cpu works everywhere"
        ) from error
