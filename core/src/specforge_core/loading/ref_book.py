# SPDX-License-Identifier: Apache-2.0
"""Collects refs in whatever order capture publishes them, records them in the ledger, and gives them out by sample.

Offline features are captured once (epoch 0) and serve every epoch: their refs stay in the book. Online each epoch is
captured anew and a ref leaves the book when its window takes it. A sample may then come twice (its capture process was
taken for dead and was not): a ref of a sample that was trained and freed is surplus, its features are deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from specforge_core.contracts import RefReader, SampleRef, sample_id
from specforge_core.loading.trusted_refs import TrustedRefs

if TYPE_CHECKING:
    from specforge_core.features.ledger import Ledger, LedgerEntry, NoLedger

_POLL_REFS = 4096


class RefBook:
    """Refs that have come and were not taken yet. Used by one thread.

    :param reuse: refs serve every epoch.
    :param trusted: the refs that may be trained on, out of those that came.
    :param discard: deletes a surplus ref's features.
    """

    def __init__(
        self,
        reader: RefReader,
        *,
        ledger: Ledger | NoLedger,
        reuse: bool,
        trusted: TrustedRefs,
        discard: Callable[[SampleRef], None],
    ) -> None:
        self._reader = reader
        self._ledger = ledger
        self._reuse = reuse
        self._trusted = trusted
        self._discard = discard
        self._refs: dict[str, SampleRef] = {}
        self.arrived = 0
        self.skipped = 0

    @property
    def drained(self) -> bool:
        """Nothing more will come."""
        return self._reader.drained

    def key(self, prompt_id: str, epoch: int) -> str:
        """The sample id under which training epoch ``epoch`` finds this prompt's features."""
        return sample_id(prompt_id, 0 if self._reuse else epoch)

    def missing(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key not in self._refs]

    def restore(self, refs: Iterable[SampleRef]) -> None:
        """Put in refs that came in an earlier session, or were taken and could not be used."""
        for ref in refs:
            self._keep(ref)

    def read(self, timeout: float) -> list[str] | None:
        """Take in what the channel has, waiting up to ``timeout`` seconds for the first.

        Returns the ids of samples that are in the book now; None where nothing came at all.
        """
        came = self._reader.poll(_POLL_REFS, timeout)
        if not came:
            return None
        refs = self._trusted(came)  # what is passed over is not acked: that would ack the honest ref of the same sample
        self.arrived += len(refs)
        known = {} if self._reuse else self._ledger.find([ref.sample_id for ref in refs])
        surplus = [ref for ref in refs if _is_surplus(known.get(ref.sample_id))]
        if surplus:
            for ref in surplus:  # before the acks: a process killed in between gets the refs again
                self._discard(ref)
            self._reader.ack([ref.sample_id for ref in surplus], 0)
        fresh = [ref for ref in refs if not _is_surplus(known.get(ref.sample_id))]
        self._ledger.see(fresh)
        for ref in fresh:
            self._take_in(ref, known.get(ref.sample_id))
        return [ref.sample_id for ref in fresh if ref.sample_id in self._refs]

    def _take_in(self, ref: SampleRef, entry: LedgerEntry | None) -> None:
        if entry is not None and entry.window is not None:
            if entry.trained:  # its window is acked; what came again must not stay in flight
                self._reader.ack([ref.sample_id], 0)
                return
            if entry.ref.generation >= ref.generation:
                return  # delivered again: it is in its window's hands
        self._keep(ref)

    def _keep(self, ref: SampleRef) -> None:
        known = self._refs.get(ref.sample_id)
        if known is None or known.generation <= ref.generation:
            self._refs[ref.sample_id] = ref
            self.skipped += known is None and ref.skipped

    def take(self, keys: Sequence[str]) -> list[SampleRef]:
        """The refs of ``keys``, all of which have come."""
        if self._reuse:
            return [self._refs[key] for key in keys]
        return [self._refs.pop(key) for key in keys]

    def take_rest(self) -> list[SampleRef]:
        """Every ref that no window took."""
        rest = list(self._refs.values())
        self._refs.clear()
        return rest


def _is_surplus(entry: LedgerEntry | None) -> bool:
    """Trained (or copied) and freed, and not rewound: nobody will want these features again."""
    return entry is not None and entry.freed and entry.window is not None
