# SPDX-License-Identifier: Apache-2.0
"""Compares what a run is with what a checkpoint recorded: what may differ is listed here, all else must be equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAY_DIFFER = (
    "machine",  # host, processor, versions of Python and torch: results may differ in rounding
    "ranks",
    "config.run.directory",
    "config.run.id",
    "config.run.token_file",
    "config.data.eval",
    "config.data.features",
    "config.store",
    "config.channel",
    "config.capture",
    "config.training.micro_batch_size",
    "config.training.device",
    "config.training.threads",
    "config.loading",
    "config.checkpoint",
    "config.evaluation",
    "config.bench",
)
"""Dotted keys (and everything below them) that change where or how fast a run trains, not what it trains.

Another micro-batch, capture batch, thread count or device adds numbers up in another order: the result is then the
same to rounding, not to the bit.
"""

_ABSENT = "nothing"


def find_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Every key that differs and may not, with both values."""
    then, now = _flatten(recorded), _flatten(current)
    return [
        f"{key}: the checkpoint has {_shown(then, key)}, this run has {_shown(now, key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, _ABSENT) != now.get(key, _ABSENT) and not _may_differ(key)
    ]


def _may_differ(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in MAY_DIFFER)


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else _ABSENT


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return flat
