# SPDX-License-Identifier: Apache-2.0
"""Leases: which prompts are to be captured, and who is capturing them now.

Whoever needs features *offers* batches of prompts (the train role online, the capture role offline); capture processes
*take* one at a time, publish its refs and *finish* it. Two processes never hold one batch at once, and what a dead
process held comes back. Refs and leases travel over the same channel but do not know of each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureBatch:
    """Prompts that are captured in one prefill: so many places of one epoch's order.

    Batches are cut at the same places whoever captures them, so that capturing one again repeats the same bits.

    :param first: place of the batch's first prompt in the order of ``epoch``; ``count`` prompts from there.
    :param wanted: offsets inside the batch whose features are put and published; the others are captured only because
        they were captured together before. Empty: all.
    :param fingerprint: of what both halves must agree on: target, features and prompts.
    """

    split: Split
    epoch: int
    first: int
    count: int
    wanted: tuple[int, ...] = ()
    fingerprint: str = ""

    @property
    def key(self) -> str:
        """What makes two offers the same batch."""
        return f"{self.split}.{self.epoch}.{self.first}+{self.count}"

    @property
    def offsets(self) -> Sequence[int]:
        """The offsets that are wanted."""
        return self.wanted or range(self.count)


_MOST_PROMPTS = 1 << 20
"""Of one prefill; no device holds the hidden states of a million prompts."""
_MOST_PLACES = 1 << 53
"""What every reader of JSON keeps exactly."""


def read_batch(fields: Mapping[str, Any]) -> CaptureBatch:
    """The batch that a channel kept, field by field; whoever writes into the channel can have made it.

    :raises ValueError: no desk can have been offered this.
    """
    if {*fields} != {"split", "epoch", "first", "count", "wanted", "fingerprint"} or type(fields["wanted"]) is not list:
        raise ValueError("not the fields of a batch")
    batch = CaptureBatch(**{**fields, "wanted": tuple(fields["wanted"])})
    check_batch(batch)
    return batch


def check_batch(batch: CaptureBatch) -> None:
    """:raises ValueError: nobody who reads it from a channel would take it."""
    if batch.split not in ("train", "eval") or type(batch.fingerprint) is not str:
        raise ValueError("neither split nor fingerprint of a batch")
    numbers = (batch.epoch, batch.first, batch.count, *batch.wanted)
    if not all(type(n) is int and 0 <= n <= _MOST_PLACES for n in numbers) or batch.count > _MOST_PROMPTS:
        raise ValueError("epoch, first and count of a batch are counts")
    if any(offset >= batch.count for offset in batch.wanted) or len({*batch.wanted}) < len(batch.wanted):
        raise ValueError("what is wanted of a batch is not in it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A batch in one holder's hands. ``attempt`` counts from 1: how often the batch was taken since it was offered."""

    batch: CaptureBatch
    holder: str
    attempt: int


class LeaseDesk(ABC):
    """Batches offered and not finished. Safe to use from several threads and, as the channel is, processes."""

    @abstractmethod
    def offer(self, batches: Sequence[CaptureBatch]) -> None:
        """Add batches, to be taken in this order. A batch whose key is outstanding stays as it is.

        Offering after ``end`` opens the desk again.
        """

    @abstractmethod
    def take(self, holder: str, timeout: float) -> Lease | None:
        """The next batch nobody holds: what came back first, then the oldest offer. Waits up to ``timeout`` seconds.

        None: there was nothing in time, or the desk was ended. A lease lives as long as its holder does: it comes
        back, and another holder may take it, when the process that took it has died.

        :param holder: the name of a writer of this channel that the calling process has open.
        """

    @abstractmethod
    def finish(self, lease: Lease) -> None:
        """The batch's refs are published. Does nothing where the lease was lost to another holder, or finished."""

    @abstractmethod
    def give_back(self, lease: Lease) -> None:
        """The batch was not captured after all: others may take it at once, and this attempt does not count."""

    @abstractmethod
    def outstanding(self) -> list[CaptureBatch]:
        """Offered and not finished, held or not."""

    @abstractmethod
    def end(self, reason: str) -> None:
        """Nothing more is wanted: withdraws what is outstanding; holders are told by :attr:`ended`."""

    @property
    @abstractmethod
    def ended(self) -> str | None:
        """The reason given to ``end``, or None while batches are, or may be, offered."""

    @abstractmethod
    def close(self) -> None:
        """Free this process's connection to the desk; leases it still holds stay its own. Idempotent."""
