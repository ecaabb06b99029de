# SPDX-License-Identifier: Apache-2.0
"""Every ref of a channel that capture has closed: held-out features are read this way."""

from __future__ import annotations

from collections.abc import Callable

from specforge_core.contracts import DataError, RefChannel, SampleRef


def read_all(channel: RefChannel, *, expected: int, check: Callable[[SampleRef], None]) -> list[SampleRef]:
    """Every ref of a closed channel.

    :param check: raises for a ref that must not be trusted.

    :raises DataError: it holds fewer than ``expected``: capture did not finish.
    """
    reader = channel.reader()
    refs: dict[str, SampleRef] = {}
    try:
        while batch := reader.poll(4096, 0.0):
            for ref in batch:
                check(ref)
                refs[ref.sample_id] = ref
    finally:
        reader.close()
    if len(refs) < expected:
        raise DataError(
            f"{len(refs)} of {expected} held-out samples were captured",
            hint="run `specforge capture` with this run file again; it goes on where it stopped",
        )
    return list(refs.values())
