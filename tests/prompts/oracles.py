# SPDX-License-Identifier: Apache-2.0
"""Every template of these tests with its oracle."""

import oracles_channels
import oracles_odd
import oracles_plain
import oracles_short
import oracles_thoughts
import oracles_tools
from talk import TABLE

MODULES = (oracles_channels, oracles_odd, oracles_plain, oracles_short, oracles_thoughts, oracles_tools)
"""Each puts its templates into ``TABLE``."""

__all__ = ["MODULES", "TABLE"]
