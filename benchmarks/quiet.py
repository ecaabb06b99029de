# SPDX-License-Identifier: Apache-2.0
"""Whether the machine is quiet enough for figures to mean something: said first by every benchmark that takes times."""

from __future__ import annotations

import time
from pathlib import Path

_LOOK_SECONDS = 1.0
_BUSY_SHARE = 0.1
"""Of all cores: on two cores a fifth of one, which moves medians by some percent."""


def say_whether_quiet() -> None:
    """Print how busy the machine is while this process sleeps for a second."""
    busy = busy_share()
    if busy is None:
        print("how busy this machine is cannot be told here; look before you believe the figures", flush=True)
    elif busy > _BUSY_SHARE:
        print(f"NOT QUIET: other work takes {busy:.0%} of this machine; the figures mean little", flush=True)
    else:
        print(f"quiet: other work takes {busy:.0%} of this machine", flush=True)


def busy_share() -> float | None:
    """The share of all cores' time that is used; None where the kernel does not say."""
    before = _times()
    time.sleep(_LOOK_SECONDS)
    after = _times()
    if before is None or after is None:
        return None
    spent = [late - early for early, late in zip(before, after, strict=True)]
    total = sum(spent)
    idle = spent[3] + spent[4]  # idle, and waiting for a disk
    return 1 - idle / total if total else None


def _times() -> list[int] | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    return [int(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9]]
