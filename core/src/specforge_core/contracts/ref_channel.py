# SPDX-License-Identifier: Apache-2.0
"""Ref channels move metadata between the two halves of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specforge_core.contracts.leases import LeaseDesk
from specforge_core.contracts.records import SampleRef


@dataclass(frozen=True, slots=True)
class ChannelCapabilities:
    """What a channel's refs survive. ``replayable``: refs that no reader acked can be read again by a later reader."""

    cross_process: bool = False
    cross_host: bool = False
    durable: bool = False
    replayable: bool = False


@dataclass(frozen=True, slots=True)
class InFlight:
    """Refs published and not yet acked, and the bytes of the features they describe."""

    refs: int
    nbytes: int


class RefWriter(ABC):
    """The capture side. Any number of writers may publish to one channel."""

    @abstractmethod
    def publish(self, refs: Sequence[SampleRef]) -> None:
        """Make refs visible to the reader, in order, durably where the channel is durable.

        A reader that died is no error here: what was captured is worth keeping for the one that takes its place.

        :raises TypeError: a ref holds anything but metadata.
        :raises ChannelFailed: the reading side failed; the message is its reason.
        :raises ChannelError: the writer was closed.
        """

    @abstractmethod
    def in_flight(self) -> InFlight:
        """What this channel's writers published and no reader has acked.

        :raises ChannelFailed: the reading side failed; the message is its reason.
        :raises PeerDied: there was a reader, and none lives.
        """

    @abstractmethod
    def published(self) -> Sequence[SampleRef]:
        """What every writer of this channel published and no reader acked, each writer's in order.

        What an interrupted capture need not capture again.
        """

    @abstractmethod
    def close(self) -> None:
        """Say that this writer has published everything. Idempotent."""

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Say that this writer cannot go on; the reader's next ``poll`` raises ChannelFailed with the reason."""


class RefReader(ABC):
    """The train side. One run reads a channel."""

    @abstractmethod
    def poll(self, max_refs: int, timeout: float) -> list[SampleRef]:
        """Refs not delivered before, oldest first, at most ``max_refs``; waits up to ``timeout`` seconds for the first.

        An empty list means that nothing came in time or that the channel is drained.

        :raises ChannelFailed: a writer failed since this reader was opened; the message is its reason.
        :raises PeerDied: nothing is there to deliver, some writer ended without closing, and no writer lives.
        """

    @property
    @abstractmethod
    def drained(self) -> bool:
        """True once every writer has closed and everything published was delivered."""

    @abstractmethod
    def ack(self, sample_ids: Iterable[str], step: int) -> None:
        """Record that these samples were trained by optimizer step ``step``; they are no longer in flight."""

    @abstractmethod
    def fail(self, reason: str) -> None:
        """Say that the reading side cannot go on; the writers' next call raises ChannelFailed with the reason."""

    @abstractmethod
    def close(self) -> None:
        """Give back what this side holds. Idempotent."""


class RefChannel(ABC):
    """One channel of one run, opened by either half."""

    @abstractmethod
    def writer(self, name: str) -> RefWriter:
        """A writer of that name (one per capture process). Reopening a name continues what it published."""

    @abstractmethod
    def reader(self) -> RefReader:
        """The reader: of everything that no earlier reader acked where the channel is replayable."""

    @abstractmethod
    def leases(self) -> LeaseDesk:
        """The channel's desk, the same for everybody who opens it."""

    @abstractmethod
    def seal(self) -> None:
        """Everything is published, whoever was to publish it: closes every writer that ended without closing.

        Writers that live are left to close themselves.
        """
