# SPDX-License-Identifier: Apache-2.0
"""Compares what a run is with what a checkpoint recorded: what may differ is listed here, all else must be equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from specforge_core.contracts.redaction import show_value

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
    "config.regenerate",  # what it made are data, whose contents count
    "config.bench",
)
"""Dotted keys (and everything below them) that change where or how fast a run trains, not what it trains.

Another micro-batch, capture batch, thread count or device adds numbers up in another order: the result is then the
same to rounding, not to the bit.
"""

_ABSENT: Any = object()
_MOST_DIFFERENCES = 100
"""Of a list that is read by a person; a record that was altered can have millions."""
_MOST_CHARACTERS = 100
"""Of one part of a key that is shown: a checkpoint that was handed over may have keys of any length."""


def find_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The keys that differ and may not, with both values; of more than a hundred, the first hundred."""
    found = list(islice(_differences(recorded, current, ""), _MOST_DIFFERENCES + 1))
    return found if len(found) <= _MOST_DIFFERENCES else [*found[:_MOST_DIFFERENCES], "and more"]


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in sorted(then.keys() | now.keys()):
        name = f"{prefix}{key[:_MOST_CHARACTERS]}"
        if any(name == free or name.startswith(free + ".") for free in MAY_DIFFER):
            continue
        old, new = then.get(key, _ABSENT), now.get(key, _ABSENT)
        sections = [value for value in (old, new) if isinstance(value, Mapping)]
        if len(sections) == 2 or (sections and _ABSENT in (old, new)):
            yield from _differences(old if old is not _ABSENT else {}, new if new is not _ABSENT else {}, f"{name}.")
        elif _as_json(old) != _as_json(new):
            yield f"{name}: the checkpoint has {_shown(old)}, this run has {_shown(new)}"


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else show_value(value)
