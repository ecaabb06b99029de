# SPDX-License-Identifier: Apache-2.0
"""Every ref of a channel that capture has closed: held-out features are read this way."""

from __future__ import annotations

from specforge_core.contracts import DataError, RefChannel, SampleRef


def read_all(channel: RefChannel, *, expected: int) -> list[SampleRef]:
    """Every ref of a closed channel.

    :raises DataError: it holds fewer than ``expected``: capture did not finish.
    """
    reader = channel.reader()
    refs: dict[str, SampleRef] = {}
    try:
        while batch := reader.poll(4096, 0.0):
            refs.update((ref.sample_id, ref) for ref in batch)
    finally:
        reader.close()
    if len(refs) < expected:
        raise DataError(
            f"{len(refs)} of {expected} held-out samples were captured",
            hint="run `specforge capture` with this run file again; it goes on where it stopped",
        )
    return list(refs.values())
