# SPDX-License-Identifier: Apache-2.0
"""Sample refs as compact records, and back to the identical refs.

Most samples of a run consist of the same tensors but for their length. So a *layout* (store, names, dtypes, dimensions
with the sample's length left open) is recorded once, and a ref is then a handful of plain values::

    layout   [store, [[name, dtype, norm, [null, 3, 64]], …]]          null: the sample's number of tokens
    ref      [layout number, prompt id, epoch, generation, tokens, sample id or null, signature]

Trailing fields are left out where they follow from the others. Records are JSON values; how they are framed is the
channel's affair.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from specforge_core.contracts import DTYPE_BYTES, FeatureSpec, SampleRef, check_metadata_only, sample_id

Layout = tuple[str, tuple[tuple[str, str, str | None, tuple[int | None, ...]], ...]]


class RefEncoder:
    """Turns refs into records, and remembers which layouts were recorded."""

    def __init__(self, layouts: Iterable[Layout] = ()) -> None:
        self._numbers = {layout: number for number, layout in enumerate(layouts)}

    def copy(self) -> RefEncoder:
        """An encoder that can be thrown away if what it encoded is not written after all."""
        return RefEncoder(self._numbers)

    def encode(self, ref: SampleRef) -> tuple[Layout | None, list[Any]]:
        """The ref's record, and the layout that must be recorded before it where it is a new one.

        :raises TypeError: the ref holds anything but metadata.
        :raises ValueError: a dtype that cannot be recorded.
        """
        check_metadata_only(ref)
        layout = _layout_of(ref)
        new = layout not in self._numbers
        if new and any(entry[1] not in DTYPE_BYTES for entry in layout[1]):
            raise ValueError(f"{ref.sample_id}: a feature's dtype is not one of {sorted(DTYPE_BYTES)}")
        number = self._numbers.setdefault(layout, len(self._numbers))
        record: list[Any] = [number, ref.prompt_id, ref.epoch, ref.generation, ref.num_tokens]
        own_id = None if ref.sample_id == sample_id(ref.prompt_id, ref.epoch) else ref.sample_id
        if own_id is not None or ref.signature:
            record.append(own_id)
        if ref.signature:
            record.append(ref.signature)
        return (layout if new else None), record


def _layout_of(ref: SampleRef) -> Layout:
    tokens = ref.num_tokens
    return ref.store, tuple(
        [
            (spec.name, spec.dtype, spec.norm, (None, *spec.shape[1:]) if spec.shape[:1] == (tokens,) else spec.shape)
            for spec in ref.features
        ]
    )


class RefDecoder:
    """Turns records back into refs. Strict: what is not exactly a record raises ValueError."""

    def __init__(self) -> None:
        self.layouts: list[Layout] = []
        self._specs: dict[tuple[int, int], tuple[FeatureSpec, ...]] = {}

    def add_layout(self, record: Any) -> None:
        """Take in a layout record; it gets the next number.

        :raises ValueError: it is malformed.
        """
        try:
            store, entries = record
            layout = tuple((name, dtype, norm, tuple(shape)) for name, dtype, norm, shape in entries)
        except TypeError as error:
            raise ValueError(f"malformed layout: {error}") from error
        if type(store) is not str or not all(_is_entry(entry) for entry in layout):
            raise ValueError("malformed layout")
        self.layouts.append((store, layout))

    def decode(self, record: Any) -> SampleRef:
        """:raises ValueError: the record is malformed or names a layout that was not recorded."""
        if type(record) is not list or not 5 <= len(record) <= 7:
            raise ValueError("a ref record has five to seven fields")
        number, prompt_id, epoch, generation, num_tokens = record[:5]
        own_id = record[5] if len(record) > 5 else None
        signature = record[6] if len(record) > 6 else ""
        counts = type(number) is type(epoch) is type(generation) is type(num_tokens) is int
        if not counts or number < 0 or epoch < 0 or generation < 0 or num_tokens < 0:
            raise ValueError("layout, epoch, generation and tokens are counts")
        if type(prompt_id) is not str or type(signature) is not str or type(own_id) not in (str, type(None)):
            raise ValueError("ids and signature are text")
        if number >= len(self.layouts):
            raise ValueError(f"layout {number} was not recorded")
        return SampleRef(  # by position: it is made once per ref
            sample_id(prompt_id, epoch) if own_id is None else own_id,
            generation,
            self.layouts[number][0],
            self._specs.get((number, num_tokens)) or self._features(number, num_tokens),
            num_tokens,
            prompt_id,
            epoch,
            signature,
        )

    def _features(self, number: int, num_tokens: int) -> tuple[FeatureSpec, ...]:
        """Refs of one layout and length share their specs."""
        key = (number, num_tokens)
        if key not in self._specs:
            self._specs[key] = tuple(
                FeatureSpec(name, tuple(num_tokens if n is None else n for n in shape), dtype, norm)  # type: ignore[arg-type]
                for name, dtype, norm, shape in self.layouts[number][1]
            )
        return self._specs[key]


def _is_entry(entry: tuple[Any, ...]) -> bool:
    name, dtype, norm, shape = entry
    dimensions = all(n is None or (type(n) is int and n >= 0) for n in shape)
    return type(name) is str and dtype in DTYPE_BYTES and norm in (None, "pre", "post") and dimensions
