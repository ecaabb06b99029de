# SPDX-License-Identifier: Apache-2.0
"""The channel of a run as a queue of capture work with results.

The train role (offline: the capture role itself) *offers* batches of prompts. Capture workers *take* one at a time and
*finish* it with the refs of what they captured: finishing is publishing, one act. The train role reads *results* in the
order in which they were finished and *commits* what its ledger has recorded; the queue may then forget it.

A lease's number grows over the queue's whole life. It is the generation under which a worker puts features, and a
fencing token: a worker that lost its lease cannot finish it any more, and a store keeps the highest number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from specforge_core.contracts.leases import CaptureBatch, check_batch
from specforge_core.contracts.records import SampleRef, check_metadata_only

EndKind = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedLease:
    """A batch in one worker's hands.

    :param number: generation of what is put under this lease; no other lease of the queue has it.
    :param attempt: how often the batch was taken since it was offered, from 1. What was given back does not count.
    :param session: in which it was taken.
    """

    batch: CaptureBatch
    worker: str
    number: int
    attempt: int
    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one session of a queue ended.

    :param by: who ended it: a worker's name, or the train role's.
    :param what: in a failure, what went wrong, with ``where`` and ``hint`` as its error had them.
    """

    kind: EndKind
    session: int
    by: str = ""
    what: str = ""
    where: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished batch.

    :param position: of the result among all of the queue's, from 1, without gaps.
    :param number: of the lease under which it was finished; every ref's generation.
    """

    position: int
    batch: CaptureBatch
    number: int
    worker: str
    refs: Sequence[SampleRef]
    signature: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The state of a queue, as far as a reader needs it.

    :param identity: of the queue. One that was made anew, or lost everything, has another: its positions begin again.
    :param results: finished batches, oldest first; more may follow these.
    :param members: names of those that have joined and live.
    :param ending: how the session ended; None while it goes on, or none has begun.
    :param outstanding: number of batches offered and not finished.
    """

    identity: str
    results: Sequence[Result]
    members: frozenset[str]
    session: int
    ending: Ending | None
    outstanding: int


_MOST_NUMBER = 2**53 - 1
"""The largest integer that every reader of JSON keeps exactly."""


def check_offer(batches: Sequence[CaptureBatch], above: int) -> None:
    """:raises ValueError: a batch or a number that nobody who reads it would take."""
    if type(above) is not int or not 0 <= above < _MOST_NUMBER:
        raise ValueError(f"a number of leases is a count below 2^53, not {above!r}")
    for batch in batches:
        check_batch(batch)


def check_refs(lease: NumberedLease, refs: Sequence[SampleRef]) -> None:
    """
    :raises TypeError: a ref holds anything but metadata.
    :raises ValueError: a ref is of another generation than the lease's number; skipped ones have none.
    """
    for ref in refs:
        check_metadata_only(ref)
        if not ref.skipped and ref.generation != lease.number:
            raise ValueError(f"{ref.sample_id} is of generation {ref.generation}, its lease has number {lease.number}")


class Membership(ABC):
    """A worker, or the train role, as the others see it: alive while this is open.

    A member that stood still for so long that it was taken for dead lost its leases; it is one again when it goes on.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @abstractmethod
    def close(self) -> None:
        """Leave. What is still leased comes back at once. Idempotent."""


class CaptureQueue(ABC):
    """Safe to use from several threads and, as its capabilities say, processes and hosts. Every wait ends."""

    @abstractmethod
    def join(self, name: str) -> Membership:
        """Live under a name that nobody else of the queue has. What a dead member held comes back.

        :raises ChannelError: somebody lives under that name.
        """

    @abstractmethod
    def offer(self, batches: Sequence[CaptureBatch], *, above: int = 0) -> None:
        """Add batches, to be taken in this order. Opens the next session where the last has ended.

        A batch that is outstanding, or whose result is not committed yet, stays as it is.

        :param above: leases get higher numbers than this one: what was put under an earlier queue's stays older.
        :raises ValueError: a batch or a number that nobody who reads it would take; nothing is offered then.
        """

    @abstractmethod
    def take(self, worker: str, timeout: float) -> NumberedLease | None:
        """The next batch that nobody holds: what came back first, then the oldest offer.

        None: there was nothing in time, or the session has ended.

        :raises ChannelError: nobody of that name has joined here.
        """

    @abstractmethod
    def finish(self, lease: NumberedLease, refs: Sequence[SampleRef], *, signature: str = "") -> bool:
        """Publish a batch's refs, durably where the queue is durable, and let go of it.

        False: the lease was lost, to another worker or because the session has ended. Nothing was published then, and
        nobody will read what was put under it.

        :raises TypeError: a ref holds anything but metadata.
        :raises ValueError: a ref is of another generation than the lease's number.
        """

    @abstractmethod
    def give_back(self, lease: NumberedLease, *, instead: Sequence[CaptureBatch] = ()) -> None:
        """The batch was not captured: others may take it at once, and this attempt does not count.

        :param instead: parts of the batch that take its place, each with no attempt made.
        """

    @abstractmethod
    def outstanding(self) -> Sequence[CaptureBatch]:
        """Offered and not finished, held or not."""

    @abstractmethod
    def results(self, after: int, timeout: float) -> Results:
        """Results with a higher position than ``after``, waiting up to ``timeout`` seconds for the first or an ending.

        What is committed is gone; reading forgets nothing.
        """

    @abstractmethod
    def commit(self, position: int) -> None:
        """Results up to this position are recorded elsewhere; they may be forgotten."""

    @abstractmethod
    def end(self, ending: Ending) -> bool:
        """End the session that ``ending`` names: what is outstanding is withdrawn, held or not.

        False: another session is open, or this one has ended already.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what this process holds open. Idempotent."""
