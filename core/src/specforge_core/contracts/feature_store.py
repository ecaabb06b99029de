# SPDX-License-Identifier: Apache-2.0
"""Feature stores move tensors between the two halves of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from specforge_core.contracts.records import Sample, SampleRef


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """What a store's features survive and where they can be read from."""

    cross_process: bool = False
    cross_host: bool = False
    durable: bool = False
    zero_copy: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a store holds now. ``capacity_bytes`` is None where nothing limits it but the machine."""

    samples: int
    nbytes: int
    capacity_bytes: int | None = None


class FeatureStore(ABC):
    """Holds samples' tensors until they are deleted. Never evicts; what it reads is data.

    Safe to use from several threads; where ``cross_process`` is declared, from several processes.
    """

    @abstractmethod
    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        """Store all of a sample's tensors or none, and return the ref that describes them (unsigned).

        A second ``put`` of one id replaces the first and bumps the generation, also after a ``delete``.

        :raises StoreFull: there is no room; nothing partial was kept.
        :raises StoreError: an id that the store cannot hold (one that would escape its directory, say).
        """

    @abstractmethod
    def get(self, ref: SampleRef) -> Sample:
        """Return exactly what the ref describes, in memory that the caller owns.

        :raises FeatureGone: it was deleted.
        :raises StaleRef: a later ``put`` replaced it.
        :raises FeatureCorrupt: what is stored is short, torn or of another shape or dtype.
        """

    @abstractmethod
    def delete(self, ref: SampleRef) -> None:
        """Free a sample's bytes. Deleting what is gone, or was replaced by a later ``put``, does nothing."""

    def sync(self) -> None:  # noqa: B027 - most stores have nothing to do
        """Make what this process put so far survive a power cut, where the store is ``durable``.

        Refs are published after it. Other processes see features, and features survive their process, without it.
        """

    @abstractmethod
    def usage(self) -> Usage:
        """What is held now."""

    @abstractmethod
    def close(self) -> None:
        """Give back what this process holds. Idempotent; durable features stay."""
