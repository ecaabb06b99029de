# SPDX-License-Identifier: Apache-2.0
"""The refs of a channel that capture has closed: held-out features are read this way."""

from __future__ import annotations

from collections.abc import Sequence

from specforge_core.contracts import DataError, RefChannel, SampleRef
from specforge_core.loading.trusted_refs import TrustedRefs


def read_all(channel: RefChannel, sample_ids: Sequence[str], *, trusted: TrustedRefs) -> list[SampleRef]:
    """A closed channel's ref of each of ``sample_ids``, in their order.

    :param trusted: the refs that may be used, out of those that came.
    :raises DataError: some are not there: capture did not finish.
    """
    reader = channel.reader()
    refs: dict[str, SampleRef] = {}
    try:
        while batch := reader.poll(4096, 0.0):
            for ref in trusted(batch):
                newest = max(refs.get(ref.sample_id, ref), ref, key=lambda known: known.generation)
                refs[ref.sample_id] = newest  # an older one may be replayed
    finally:
        reader.close()
    missing = [sample_id for sample_id in sample_ids if sample_id not in refs]
    if missing:
        raise DataError(
            f"{len(sample_ids) - len(missing)} of {len(sample_ids)} held-out samples were captured"
            + (f"; {trusted.note}" if trusted.note else ""),
            where=f"sample {missing[0]}",
            hint="run `specforge capture` with this run file again; it goes on where it stopped",
        )
    return [refs[sample_id] for sample_id in sample_ids]
