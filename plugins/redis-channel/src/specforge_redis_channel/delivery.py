# SPDX-License-Identifier: Apache-2.0
"""What a reader was given and what of it is trained: which refs of which entries. No client inside.

After a lost connection the server may be another, or an older one of itself. So places in the stream are forgotten and
found again by what stands there: a ref that was delivered and not acked is recognised and not delivered twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
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
    _places: dict[str, list[int]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.acked_refs == len(self.refs)

    def mark(self, index: int) -> None:
        if not self.acked >> index & 1:
            self.acked |= 1 << index
            self.acked_refs += 1
            self.acked_bytes += self.refs[index].nbytes

    def mark_sample(self, sample_id: str) -> None:
        if not self._places:
            for index, ref in enumerate(self.refs):
                self._places.setdefault(ref.sample_id, []).append(index)
        for index in self._places.get(sample_id, ()):
            self.mark(index)


class Delivery:
    """Fetched → ready → held (delivered) → acked."""

    def __init__(self, decoder: EntryDecoder) -> None:
        self._decoder = decoder
        self._fetched: deque[tuple[RawEntry, int]] = deque()
        self._ready: deque[tuple[Entry, Sequence[int]]] = deque()
        self._held: dict[str, Entry] = {}
        self._held_before: dict[str, list[Entry]] = {}
        """Of samples that were published again and delivered again before they were acked."""
        self._unplaced: dict[str, int] = {}
        """Generations of what was delivered over an earlier connection, and was not yet found again."""

    @property
    def idle(self) -> bool:
        """Nothing is there to deliver."""
        return not self._fetched and not self._ready

    def wanted(self, max_refs: int) -> int:
        """At most how many entries it takes to deliver so many refs."""
        return 0 if self._fetched else max(0, max_refs - sum(len(indexes) for _, indexes in self._ready))

    def add(self, entries: Iterable[RawEntry], acked: Mapping[bytes, int] | None = None) -> None:
        """Take in entries, of which some refs may be acked: a bit per ref."""
        self._fetched.extend((entry, (acked or {}).get(entry[0], 0)) for entry in entries)

    def forget_places(self) -> None:
        """The server may have changed: what was fetched is fetched again, what is held is looked for again."""
        self._fetched.clear()
        self._ready.clear()
        for entry in {id(entry): entry for entry in self._held.values()}.values():
            held = (ref for ref in entry.refs if self._held.get(ref.sample_id) is entry)
            self._unplaced.update((ref.sample_id, ref.generation) for ref in held)
        self._held.clear()
        self._held_before.clear()

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
                refs += self._deliver_of_one(max_refs - len(refs))
            elif not self._try_next(raising=not refs):
                break
        return refs

    def mark(self, sample_ids: Iterable[str]) -> list[Entry]:
        """Mark what was delivered of these samples as acked; the entries that it changes."""
        changed: dict[bytes, Entry] = {}
        for sample_id in sample_ids:
            if sample_id in self._held:
                for entry in (self._held[sample_id], *self._held_before.get(sample_id, ())):
                    entry.mark_sample(sample_id)
                    changed[entry.number] = entry
        return list(changed.values())

    def drop(self, sample_ids: Iterable[str]) -> None:
        """These are acked in the server, too."""
        for sample_id in sample_ids:
            self._held.pop(sample_id, None)
            self._held_before.pop(sample_id, None)
            self._unplaced.pop(sample_id, None)

    def _deliver_of_one(self, count: int) -> list[SampleRef]:
        entry, indexes = self._ready.popleft()
        if len(indexes) > count:
            self._ready.appendleft((entry, indexes[count:]))
        refs = [entry.refs[index] for index in indexes[:count]]
        for ref in refs:
            self._hold(ref.sample_id, entry)
        return refs

    def _hold(self, sample_id: str, entry: Entry) -> None:
        before = self._held.get(sample_id)
        if before is not None and before is not entry:
            self._held_before.setdefault(sample_id, []).append(before)
        self._held[sample_id] = entry

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
        indexes: Sequence[int] = range(len(refs))
        if bits or self._unplaced:
            indexes = [index for index in indexes if not self._is_known(entry, index, bits)]
        if indexes:
            self._ready.append((entry, indexes))

    def _is_known(self, entry: Entry, index: int, bits: int) -> bool:
        """Whether the ref is acked, or was delivered over an earlier connection."""
        ref = entry.refs[index]
        if bits >> index & 1:
            entry.mark(index)
            return True
        if self._unplaced.get(ref.sample_id) == ref.generation:
            del self._unplaced[ref.sample_id]
            self._hold(ref.sample_id, entry)
            return True
        return False
