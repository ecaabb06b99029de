# SPDX-License-Identifier: Apache-2.0
"""Stream entries: many refs in one, with what is needed to read it alone.

Fields of an entry: ``w`` the writer, ``l`` a JSON list of layouts and ``r`` a batch of refs, in the compact records of
``specforge_core.RefEncoder``. The stream can be written by whoever reaches the server, so an entry is exactly that or
it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from specforge_core import RefDecoder, RefEncoder
from specforge_core.contracts import ChannelError, SampleRef
from specforge_core.contracts.files import parse_json

_REFS_PER_ENTRY = 256
_MOST_ENTRIES = 2000  # of one publish: a script takes no more than some thousand arguments
_MOST_BYTES = 8 << 20
"""Of one entry: its 256 refs, or 500 of the largest batches, take some hundred kilobytes."""
_MOST_DECODERS = 64
_MOST_LAYOUTS = 8  # few runs have more than two; an entry need not carry what an odd one had long ago

RawEntry = tuple[bytes, Sequence[bytes] | None]


class EntryEncoder:
    """Turns refs into entries, one writer's. Each holds all layouts known so far, so that it can be read alone."""

    def __init__(self) -> None:
        self._encoder = RefEncoder()

    def encode(self, refs: Sequence[SampleRef]) -> list[bytes]:
        """``l`` and ``r`` of every entry, one after the other.

        :raises TypeError: a ref holds anything but metadata.
        :raises ValueError: a ref that cannot be recorded.
        """
        size = max(_REFS_PER_ENTRY, -(-len(refs) // _MOST_ENTRIES))
        fields: list[bytes] = []
        for first in range(0, len(refs), size):
            if len(self._encoder.layouts) > _MOST_LAYOUTS:
                self._encoder = RefEncoder()
            _, batch = self._encoder.encode_batch(refs[first : first + size])
            fields += [_json(self._encoder.layouts), _json(batch)]
        return fields


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


class EntryDecoder:
    """Turns entries back into refs. Entries of the same layouts share what was read of them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._decoders: dict[bytes, RefDecoder] = {}

    def decode(self, raw: RawEntry) -> tuple[bytes, list[SampleRef]]:
        """The writer and its refs.

        :raises ChannelError: the entry is not one that a writer of this format added.
        """
        number, fields = raw
        try:
            if fields is None or len(fields) != 6 or (fields[0], fields[2], fields[4]) != (b"w", b"l", b"r"):
                raise ValueError("its fields are not w, l and r")
            if len(fields[3]) + len(fields[5]) > _MOST_BYTES:
                raise ValueError(f"it has more than {_MOST_BYTES} bytes")
            entry, writer = (part.decode("utf-8", "replace") for part in (number, fields[1]))
            origin = f"{self._where}, entry {entry} of writer {writer}"
            return fields[1], self._decoder_of(fields[3]).decode_batch(parse_json(fields[5]), origin=origin)
        except ValueError as error:
            name = number.decode("ascii", "replace")
            raise ChannelError(
                f"entry {name} was not written by a writer of refs: {error}",
                where=self._where,
                hint=f"find out who else writes there, then remove it: XDEL <name>:refs {name}",
            ) from None

    def _decoder_of(self, layouts: bytes) -> RefDecoder:
        if layouts not in self._decoders:
            decoder = RefDecoder()
            records = parse_json(layouts)
            if type(records) is not list:
                raise ValueError("it holds no list of layouts")
            for record in records:
                decoder.add_layout(record)
            if len(self._decoders) >= _MOST_DECODERS:
                self._decoders.clear()
            self._decoders[layouts] = decoder
        return self._decoders[layouts]
