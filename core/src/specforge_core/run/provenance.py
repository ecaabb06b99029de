# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, recorded beside its results and in its checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch


def describe_run(resolved: Mapping[str, Any], plugins: Mapping[str, Any], *, prompts: str) -> dict[str, Any]:
    """Everything that decides a run's result.

    :param resolved: the resolved run file.
    :param plugins: the parts' distributions and versions.
    :param prompts: fingerprint of the training prompts.
    """
    return {
        "config": dict(resolved),
        "plugins": {
            part: {key: source[key] for key in ("distribution", "version")} for part, source in plugins.items()
        },
        "prompts": prompts,
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }
