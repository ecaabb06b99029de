# SPDX-License-Identifier: Apache-2.0
"""Which prompt ids were given already: twelve bytes for each slot of a table instead of an object for each id.

The table keeps a 64-bit hash and the prompt's number. Where a hash is found, the id itself is read from where it was
written and compared, so two ids of one hash are told apart.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Callable

from xxhash import xxh3_64_intdigest

_FIRST_SLOTS = 1 << 10
"""Some kilobytes; doubled whenever it is half full."""
_EMPTY = 0


class IdTable:
    """An open-addressed table of prompt ids.

    :param written: the id of prompt number so many, as it was written.
    """

    def __init__(self, written: Callable[[int], bytes]) -> None:
        self._written = written
        self._seed = secrets.randbits(64)  # rows cannot have been made to fall on one slot
        self._count = 0
        self._make(_FIRST_SLOTS)

    def find(self, prompt_id: bytes) -> int | None:
        """The number of the prompt that has this id; None if there is none."""
        key = self._key(prompt_id)
        slot = key & self._mask
        while self._keys[slot] != _EMPTY:
            if self._keys[slot] == key and self._written(self._numbers[slot]) == prompt_id:
                return self._numbers[slot]
            slot = (slot + 1) & self._mask
        return None

    def add(self, prompt_id: bytes) -> None:
        """The next prompt has this id, which ``find`` did not find."""
        if 2 * (self._count + 1) > len(self._keys):
            keys, numbers = self._keys, self._numbers
            self._make(2 * len(keys))
            for key, number in zip(keys, numbers, strict=True):
                if key != _EMPTY:
                    self._put(key, number)
        self._put(self._key(prompt_id), self._count)
        self._count += 1

    def _make(self, slots: int) -> None:
        self._keys, self._numbers = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))
        self._mask = slots - 1

    def _key(self, prompt_id: bytes) -> int:
        return xxh3_64_intdigest(prompt_id, self._seed) or 1

    def _put(self, key: int, number: int) -> None:
        slot = key & self._mask
        while self._keys[slot] != _EMPTY:
            slot = (slot + 1) & self._mask
        self._keys[slot], self._numbers[slot] = key, number
