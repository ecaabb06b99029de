# SPDX-License-Identifier: Apache-2.0
"""The environment variables that bound the vendor library's waits.

The library takes its limits from the environment, once, when its first client is made; unset, it waits for a missing
master for a minute and a half, and for a stalled peer for longer. This is the only place of this distribution that
touches the environment. What the user has set stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

LIMITS: Mapping[str, str] = {
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",  # attempts to reach the master at first; each some 4 s
    "MC_RPC_TIMEOUT_MS": "3000",  # one question to the master
    "MC_TCP_STATUS_TIMEOUT_SEC": "3",  # a peer's word that it will answer
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "3",  # a transfer that does not move
    "MC_LOG_LEVEL": "ERROR",
}


def limit_waits(host: str) -> None:
    """Set what is not set; ``host`` is the address at which this process's tensors may be read."""
    for name, value in {**LIMITS, "MC_TCP_BIND_ADDRESS": host}.items():
        os.environ.setdefault(name, value)
