# SPDX-License-Identifier: Apache-2.0
"""Collects refs in whatever order capture publishes them and gives them out by sample.

Offline features are captured once (epoch 0) and serve every epoch: their refs stay in the book. Online each epoch is
captured anew and a ref leaves the book when its window takes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from specforge_core.contracts import RefReader, SampleRef, sample_id

_POLL_REFS = 4096


class RefBook:
    """Refs that have come and were not taken yet. Used by one thread."""

    def __init__(self, reader: RefReader, *, reuse: bool) -> None:
        self._reader = reader
        self._reuse = reuse
        self._refs: dict[str, SampleRef] = {}
        self.arrived = 0

    @property
    def drained(self) -> bool:
        """Nothing more will come."""
        return self._reader.drained

    def key(self, prompt_id: str, epoch: int) -> str:
        """The sample id under which training epoch ``epoch`` finds this prompt's features."""
        return sample_id(prompt_id, 0 if self._reuse else epoch)

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key not in self._refs]

    def read(self, timeout: float) -> bool:
        """Take in what the channel has, waiting up to ``timeout`` seconds for the first; False where nothing came."""
        refs = self._reader.poll(_POLL_REFS, timeout)
        for ref in refs:
            known = self._refs.get(ref.sample_id)
            if known is None or known.generation <= ref.generation:
                self._refs[ref.sample_id] = ref
        self.arrived += len(refs)
        return bool(refs)

    def take(self, keys: Sequence[str]) -> list[SampleRef]:
        """The refs of ``keys``, all of which have come."""
        if self._reuse:
            return [self._refs[key] for key in keys]
        return [self._refs.pop(key) for key in keys]
