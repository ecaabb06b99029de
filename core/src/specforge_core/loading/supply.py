# SPDX-License-Identifier: Apache-2.0
"""The train role's end of the wires: asks for samples, waits for their refs, and says what became of them.

Between the loader (which wants windows) and the channel. Every wait ends: with the sample, at the deadline, when the
channel is drained, or when the run is asked to stop. While it waits it looks now and then whether something it wants
got lost, and offers that again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from specforge_core.contracts import (
    ChannelError,
    ChannelFailed,
    DataError,
    FeatureStore,
    PeerDied,
    Progress,
    RefReader,
    SampleRef,
    StopSignal,
)
from specforge_core.loading.demand import Demand, PlannedBatch
from specforge_core.loading.patience import Patience
from specforge_core.loading.ref_book import RefBook
from specforge_core.loading.trusted_refs import TrustedRefs

if TYPE_CHECKING:
    from specforge_core.features.ledger import Ledger, NoLedger

Free = Literal["never", "window", "checkpoint"]

_TICK_SECONDS = 0.1
_RELIEF_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupplyParts:
    """What a supply connects.

    :param free: when features are deleted from the store: ``never``, once their ``window`` is trained, or once a
        ``checkpoint`` covers them.
    :param reuse_features: features are captured once and belong to no run: read again each epoch, never acked.
    :param trusted: the refs that may be trained on, out of those that came.
    :param deadline_seconds: longest wait for a sample.
    """

    reader: RefReader
    store: FeatureStore
    ledger: Ledger | NoLedger
    demand: Demand
    trusted: TrustedRefs
    progress: Progress
    stop: StopSignal
    reuse_features: bool
    free: Free
    deadline_seconds: float


class Supply:
    """Refs by sample, asked for, awaited and accounted for. Used by one thread."""

    def __init__(self, parts: SupplyParts) -> None:
        self._parts = parts
        self._relieve: Callable[[], None] = lambda: None
        self._book = RefBook(
            parts.reader,
            ledger=parts.ledger,
            reuse=parts.reuse_features,
            trusted=parts.trusted,
            discard=self._delete,
        )

    @property
    def reuses(self) -> bool:
        return self._parts.reuse_features

    @property
    def skipped(self) -> int:
        """Samples that capture had to set aside, so far."""
        return self._book.skipped

    @property
    def short_of_room(self) -> bool:
        """A checkpoint now would free what keeps capture from going on."""
        return self._parts.demand.short_of_room

    def key(self, prompt_id: str, epoch: int) -> str:
        return self._book.key(prompt_id, epoch)

    def rewind(self, step: int) -> None:
        """Training stands at ``step`` finished windows: what a checkpoint covers is freed, the rest is wanted again."""
        self._parts.ledger.rewind(step)
        if self._parts.free != "never":
            covered = self._parts.ledger.covered(step)
            self._parts.reader.ack([ref.sample_id for ref in covered], step)  # as far as they were read already
            self.free(covered)

    def want(self, planned: Iterator[PlannedBatch]) -> None:
        """Have these batches captured, but for samples whose features are here, or come, from an earlier session."""
        outstanding = self._parts.demand.outstanding()
        available = [] if self._parts.reuse_features else self._parts.trusted(self._came_before())
        self._book.restore(available)
        self._parts.demand.begin(planned, {ref.sample_id for ref in available}, outstanding=outstanding)

    def relieve_by(self, relieve: Callable[[], None]) -> None:
        """What to do when a wait may be for room that only a checkpoint makes: ``relieve`` writes one."""
        self._relieve = relieve

    def collect(self, keys: Sequence[str], *, what: str, patient: bool) -> bool:
        """Read refs until all of ``keys`` have come; False where they have not and we are not to wait.

        :param what: what needs them, for messages.
        :raises DeadlineExceeded: a sample did not come in time.
        :raises DataError: a sample will never come.
        :raises ChannelFailed: the capture half failed.
        :raises RunStopped: the run was asked to stop.
        """
        self._parts.stop.raise_if_requested()
        self._parts.demand.top_up()
        missing = self._book.missing(keys)
        while missing and self._read(0.0):
            missing = self._book.missing(keys)
        if missing and patient:
            self._wait_for(keys, missing, what=what)
            return True
        return not missing

    def deal(self, window: int, keys: Sequence[str]) -> list[SampleRef]:
        """Take the refs of a window, all of which have come; recorded before they are given out."""
        self._parts.ledger.deal(window, keys)
        return self._book.take(keys)

    def lost(self, refs: Sequence[SampleRef], *, intact: Sequence[SampleRef]) -> None:
        """Features of ``refs`` are gone: have them captured again. ``intact`` were dealt with them and go back."""
        ids = [ref.sample_id for ref in refs if self._book.missing([ref.sample_id])]  # else a newer one came already
        self._parts.ledger.lost(ids)
        self._book.restore(intact)
        self._parts.demand.lost(ids)
        self._heal()

    def forget_deals(self, keys: Sequence[str]) -> None:
        """An earlier session took these samples and did not get to use them: they are wanted anew, whatever comes."""
        known = self._parts.ledger.find(keys)
        self._parts.ledger.lost([key for key, entry in known.items() if entry.window is not None])

    def trained(self, window: int, refs: Sequence[SampleRef]) -> None:
        """The window is trained, or otherwise done with: its samples are in flight no longer."""
        ids = [ref.sample_id for ref in refs]
        self._parts.ledger.trained(window)
        if self._parts.reuse_features:
            return
        self._parts.reader.ack(ids, max(window + 1, 0))
        self._parts.demand.acked(ids, kept=self._parts.free == "checkpoint")
        if self._parts.free == "window":
            self.free(refs)
        self._parts.demand.top_up()

    def free_covered(self, step: int) -> None:
        """A checkpoint covers the first ``step`` windows."""
        if self._parts.free != "never":
            self.free(self._parts.ledger.covered(step))

    def free(self, refs: Sequence[SampleRef]) -> None:
        """Delete features that nobody will want again, those too that came again after ``refs`` were taken."""
        ids = [ref.sample_id for ref in refs]
        newest = [entry.ref for entry in self._parts.ledger.find(ids).values()]
        for ref in {(ref.sample_id, ref.generation): ref for ref in (*refs, *newest)}.values():
            self._delete(ref)
        self._parts.ledger.freed(ids)
        self._parts.demand.freed(ids)

    def discard_rest(self) -> None:
        """Training has finished: what came and was not wanted, or came twice, is freed."""
        with suppress(ChannelFailed):  # how capture ended
            self._read_all()
        refs = self._book.take_rest()
        self._parts.reader.ack([ref.sample_id for ref in refs], 0)
        self.free(refs)

    def fail(self, reason: str) -> None:
        """Training cannot go on; capture, if it still runs, stops with this reason."""
        if not self._parts.reuse_features:
            with suppress(ChannelError):  # what happened first is what is told, here and by the checkpoint that follows
                self._parts.reader.fail(reason)

    def _delete(self, ref: SampleRef) -> None:
        if not ref.skipped:
            self._parts.store.delete(ref)

    def _wait_for(self, keys: Sequence[str], missing: list[str], *, what: str) -> None:
        patience = Patience(self._parts.deadline_seconds)
        self._parts.progress.waiting("features")
        while missing:
            self._parts.stop.raise_if_requested()
            drained = self._parts.reuse_features and self._book.drained  # asked before reading, or some would be missed
            came = self._read(0.0 if drained else _TICK_SECONDS, patience=patience)
            if not came and drained:
                raise self._never(keys, missing, what)
            if not came and patience.ended:
                raise patience.error(f"{self._arrived(keys, missing, what)}", sample=missing[0])
            if patience.heals() and self._heal():
                patience.renew()
            if self._parts.demand.keeps_any and (self.short_of_room or patience.waited > _RELIEF_SECONDS):
                self._relieve()
            still = self._book.missing(keys)
            if len(still) < len(missing):
                patience.renew()
            missing = still
        self._parts.progress.waiting(None)

    def _heal(self) -> bool:
        """Offer again what got lost on its way here; whether anything had."""
        outstanding = self._parts.demand.outstanding()
        self._read_all()
        try:
            return self._parts.demand.offer_again(outstanding) > 0
        except DataError as error:
            if self._parts.trusted.note:
                error.add_note(self._parts.trusted.note)
            raise

    def _came_before(self) -> list[SampleRef]:
        self._read_all()  # capture may have gone on while nobody read
        return self._parts.ledger.available()

    def _read_all(self) -> None:
        while self._read(0.0):
            pass

    def _read(self, timeout: float, *, patience: Patience | None = None) -> bool:
        """Take in refs; False where nothing came."""
        try:
            came = self._book.read(timeout)
        except PeerDied as error:
            if self._parts.reuse_features:
                raise
            self._parts.stop.raise_if_requested()
            if patience is not None:  # another capture process may take the place of those that died
                patience.died(error)
                self._parts.progress.waiting("a capture process: none is alive")
                self._parts.stop.wait(timeout)
            return False
        except ChannelFailed:
            self._parts.stop.raise_if_requested()  # capture was asked to stop too, and was quicker to say so
            raise
        if came is None:
            return False
        self._parts.demand.arrived(came)
        self._parts.demand.top_up()
        return True

    def _arrived(self, keys: Sequence[str], missing: Sequence[str], what: str) -> str:
        note = f"; {self._parts.trusted.note}" if self._parts.trusted.note else ""
        return f"{len(keys) - len(missing)} of {len(keys)} of {what}, {self._book.arrived} refs in all{note}"

    def _never(self, keys: Sequence[str], missing: Sequence[str], what: str) -> DataError:
        return DataError(
            "the features of this sample will never come: capture has ended and published "
            + self._arrived(keys, missing, what),
            where=f"sample {missing[0]}",
            hint="capture features from the same prompts, data settings and number of epochs as training uses",
        )
