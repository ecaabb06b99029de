# SPDX-License-Identifier: Apache-2.0
"""Every template of these tests with its oracle."""

import oracles_plain
import oracles_short
from talk import TABLE

__all__ = ["TABLE", "oracles_plain", "oracles_short"]
