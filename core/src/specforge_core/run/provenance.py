# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, recorded beside its results and in its checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def describe_run(
    resolved: Mapping[str, Any],
    plugins: Mapping[str, Any],
    *,
    prompts: str,
    origins: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """Everything that decides a run's result.

    :param resolved: the resolved run file.
    :param plugins: the parts' distributions and versions.
    :param prompts: fingerprint of the training prompts.
    :param origins: where they came from, as far as that is known: commits of the hub, settings of a regeneration.
    """
    return {
        "config": dict(resolved),
        "plugins": {
            part: {key: source[key] for key in ("distribution", "version")} for part, source in plugins.items()
        },
        "prompts": prompts,
        **({"origins": [dict(origin) for origin in origins]} if origins else {}),
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
    }
