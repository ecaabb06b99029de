# SPDX-License-Identifier: Apache-2.0
"""What the command line takes from the environment: one variable of the user's, and one between its own processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from specforge_core.contracts.errors import ConfigError
from specforge_core.contracts.files import parse_json

_OVERRIDES = "SPECFORGE_OVERRIDES"


def disabled_by_environment() -> list[str]:
    """``SPECFORGE_DISABLE_PLUGINS=a,b``, as ``--no-plugin`` would say it."""
    return [name.strip() for name in os.environ.get("SPECFORGE_DISABLE_PLUGINS", "").split(",") if name.strip()]


def hand_down(overrides: Sequence[str]) -> Mapping[str, str]:
    """Overrides for a child process. Everybody on the machine may read its command line, only its user this."""
    return {_OVERRIDES: json.dumps(list(overrides))}


def handed_down() -> list[str]:
    """The overrides that the process which started this one handed down; they are for this process alone.

    :raises ConfigError: somebody else set the variable.
    """
    try:
        given = parse_json(os.environ.pop(_OVERRIDES, "[]"))
    except ValueError as error:
        given = str(error)
    if not isinstance(given, list):
        raise ConfigError(
            "is not what a process of a run hands down", where=f"environment, {_OVERRIDES}", hint="unset it"
        )
    return [str(text) for text in given]
