# SPDX-License-Identifier: Apache-2.0
"""Every template of these tests with its oracle."""

import oracles_channels
import oracles_plain
import oracles_short
import oracles_thoughts
import oracles_tools
from talk import TABLE

__all__ = ["TABLE", "oracles_channels", "oracles_plain", "oracles_short", "oracles_thoughts", "oracles_tools"]
