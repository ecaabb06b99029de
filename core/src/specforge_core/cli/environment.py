# SPDX-License-Identifier: Apache-2.0
"""What the command line takes from the environment: one variable."""

from __future__ import annotations

import os


def disabled_by_environment() -> list[str]:
    """``SPECFORGE_DISABLE_PLUGINS=a,b``, as ``--no-plugin`` would say it."""
    return [name.strip() for name in os.environ.get("SPECFORGE_DISABLE_PLUGINS", "").split(",") if name.strip()]
