# SPDX-License-Identifier: Apache-2.0
"""What the command line takes from the environment: one variable of the user's, and one between its own processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

_OVERRIDES = "SPECFORGE_OVERRIDES"


def disabled_by_environment() -> list[str]:
    """``SPECFORGE_DISABLE_PLUGINS=a,b``, as ``--no-plugin`` would say it."""
    return [name.strip() for name in os.environ.get("SPECFORGE_DISABLE_PLUGINS", "").split(",") if name.strip()]


def hand_down(overrides: Sequence[str]) -> Mapping[str, str]:
    """Overrides for a child process. Everybody on the machine may read its command line, only its user this."""
    return {_OVERRIDES: json.dumps(list(overrides))}


def handed_down() -> list[str]:
    """The overrides that the process which started this one handed down; they are for this process alone."""
    return [str(text) for text in json.loads(os.environ.pop(_OVERRIDES, "[]"))]
