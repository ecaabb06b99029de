# SPDX-License-Identifier: Apache-2.0
"""What a reader was given and what of it is trained: which refs of which entries. No client inside.

After a lost connection the server may be another, or an older one of itself. So places in the stream are forgotten and
found again by what stands there: a ref that was delivered and not acked is recognised and not delivered twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from specforge_core.contracts import ChannelError, SampleRef

from specforge_redis_channel.entries import EntryDecoder, RawEntry


@dataclass(slots=True)
class Entry:
    """One stream entry; ``acked``: a bit per ref, ``acked_refs`` and ``acked_bytes``: of those."""

    number: bytes
    refs: list[SampleRef]
    acked: int = 0
    acked_refs: int = 0
    acked_bytes: int = 0

    @property
    def complete(self) -> bool:
        return self.acked_refs == len(self.refs)

    def mark(self, index: int) -> None:
        if not self.acked >> index & 1:
            self.acked |= 1 << index
            self.acked_refs += 1
            self.acked_bytes += self.refs[index].nbytes


@dataclass(slots=True)
class _Held:
    generation: int
    places: list[tuple[Entry, int]] = field(default_factory=list)


class Delivery:
    """Fetched → ready → held (delivered) → acked."""

    def __init__(self, decoder: EntryDecoder) -> None:
        self._decoder = decoder
        self._fetched: deque[tuple[RawEntry, int]] = deque()
        self._ready: deque[tuple[Entry, int]] = deque()
        self._held: dict[str, _Held] = {}

    @property
    def idle(self) -> bool:
        """Nothing is there to deliver."""
        return not self._fetched and not self._ready

    def wanted(self, max_refs: int) -> int:
        """At most how many entries it takes to deliver so many refs."""
        return 0 if self._fetched else max(0, max_refs - len(self._ready))

    def add(self, entries: Iterable[RawEntry], acked: Mapping[bytes, int] | None = None) -> None:
        """Take in entries, of which some refs may be acked: a bit per ref."""
        self._fetched.extend((entry, (acked or {}).get(entry[0], 0)) for entry in entries)

    def forget_places(self) -> None:
        """The server may have changed: what was fetched is fetched again, what is held is looked for again."""
        self._fetched.clear()
        self._ready.clear()
        for held in self._held.values():
            held.places.clear()

    def sort_in(self) -> None:
        """Read everything that was fetched.

        :raises ChannelError: an entry that no writer added; it stays where it is.
        """
        while self._fetched:
            self._sort_in_one()

    def deliver(self, max_refs: int) -> list[SampleRef]:
        """At most so many refs, oldest first.

        :raises ChannelError: nothing is there to deliver before an entry that no writer added.
        """
        refs: list[SampleRef] = []
        while len(refs) < max_refs and not self.idle:
            if self._ready:
                entry, index = self._ready.popleft()
                self._hold(entry.refs[index], (entry, index))
                refs.append(entry.refs[index])
            elif not self._try_next(raising=not refs):
                break
        return refs

    def mark(self, sample_ids: Iterable[str]) -> list[Entry]:
        """Mark what was delivered of these samples as acked; the entries that it changes."""
        changed: dict[bytes, Entry] = {}
        for sample_id in sample_ids:
            held = self._held.get(sample_id)
            for entry, index in held.places if held else ():
                entry.mark(index)
                changed[entry.number] = entry
        return list(changed.values())

    def drop(self, sample_ids: Iterable[str]) -> None:
        """These are acked in the server, too."""
        for sample_id in sample_ids:
            self._held.pop(sample_id, None)

    def _try_next(self, *, raising: bool) -> bool:
        """Read the next entry. What was delivered before a bad one must reach the caller first."""
        try:
            self._sort_in_one()
        except ChannelError:
            if raising:
                raise
            return False
        return True

    def _sort_in_one(self) -> None:
        raw, bits = self._fetched[0]
        _, refs = self._decoder.decode(raw)
        self._fetched.popleft()
        entry = Entry(raw[0], refs)
        for index, ref in enumerate(refs):
            held = self._held.get(ref.sample_id)
            if bits >> index & 1:
                entry.mark(index)
            elif held is not None and held.generation == ref.generation and not held.places:
                held.places.append((entry, index))
            else:
                self._ready.append((entry, index))

    def _hold(self, ref: SampleRef, place: tuple[Entry, int]) -> None:
        held = self._held.setdefault(ref.sample_id, _Held(ref.generation))
        held.generation = ref.generation
        held.places.append(place)
