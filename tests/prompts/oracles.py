# SPDX-License-Identifier: Apache-2.0
"""Every template of these tests with its oracle."""

import oracles_plain
import oracles_short
import oracles_thoughts
from talk import TABLE

__all__ = ["TABLE", "oracles_plain", "oracles_short", "oracles_thoughts"]
