# SPDX-License-Identifier: Apache-2.0
"""Sample refs as compact records, and back to the identical refs.

Most samples of a run consist of the same tensors but for their length. So a *layout* (store, names, dtypes, dimensions
with the sample's length left open) is recorded once, and a ref is then a handful of plain values::

    layout   [store, [[name, dtype, norm, [null, 3, 64]], …]]          null: the sample's number of tokens
    ref      [layout number, prompt id, epoch, generation, tokens, sample id or null, signature, digest]
    batch    the same with a list of prompt ids, and of every other field that is not the same for all refs

Trailing fields are left out where they follow from the others. Records are JSON values; how they are framed is the
channel's affair. Batches are checked column by column, which costs a fraction of looking at every ref.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any

from specforge_core.contracts import DTYPE_BYTES, FeatureSpec, SampleRef, check_metadata_only, sample_id
from specforge_core.contracts.records import is_plausible_shape

Layout = tuple[str, tuple[tuple[str, str, str | None, tuple[int | None, ...]], ...]]
_Content = tuple[str, int, tuple[tuple[Any, ...], ...]]
"""Store, number of tokens, and the fields of every feature."""

_FEWEST_FIELDS, _MOST_FIELDS = 5, 8
_FOLLOWING: Mapping[int, str | None] = {6: None, 7: "", 8: ""}
"""What the field at a record's end means where it is left out, by the number of fields with it."""
_MOST_COUNT = 2**63 - 1
"""The largest integer of 64 bits: what the ledger's database and every store's own numbers hold."""

_TEXT = frozenset({str})
_TEXT_OR_NONE = _TEXT | {type(None)}
_COUNT = frozenset({int})
_SPEC = frozenset({FeatureSpec})
_SETTERS = [getattr(SampleRef, item.name).__set__ for item in fields(SampleRef)]
_columns_of = attrgetter("prompt_id", "epoch", "generation", "num_tokens", "sample_id", "signature", "digest", "store")
_features_of = attrgetter("features")
_shape_of = attrgetter("shape")
_fields_of = attrgetter("name", "dtype", "norm", "shape")


class RefEncoder:
    """Turns refs into records, and remembers which layouts were recorded."""

    def __init__(self, layouts: Iterable[Layout] = ()) -> None:
        self._numbers = {layout: number for number, layout in enumerate(layouts)}
        self._seen: dict[_Content, int] = {}
        self._shared = False

    @property
    def layouts(self) -> list[Layout]:
        """What was recorded, by number."""
        return list(self._numbers)

    def copy(self) -> RefEncoder:
        """An encoder that can be thrown away if what it encoded is not written after all."""
        encoder = RefEncoder()
        encoder._numbers, encoder._seen = self._numbers, self._seen
        encoder._shared = self._shared = True  # until a layout is added
        return encoder

    def encode(self, ref: SampleRef) -> tuple[Layout | None, list[Any]]:
        """The ref's record, and the layout that must be recorded before it where it is a new one.

        :raises TypeError: the ref holds anything but metadata.
        :raises ValueError: the ref cannot be recorded: a dtype, say, that no decoder would know.
        """
        layouts, [number, [prompt_id], *others] = self.encode_batch([ref])
        return (layouts[0] if layouts else None), [number, prompt_id, *others]

    def encode_batch(self, refs: Sequence[SampleRef]) -> tuple[list[Layout], list[Any]]:
        """One record for all of ``refs`` (at least one), and the layouts that must be recorded before it.

        :raises TypeError: a ref holds anything but metadata.
        :raises ValueError: a ref cannot be recorded: a dtype, say, that no decoder would know.
        """
        columns = list(zip(*map(_columns_of, refs), strict=True))
        if not _is_plain(columns, refs):
            for ref in refs:
                check_metadata_only(ref)
            raise ValueError(f"a field of {refs[0].sample_id!r} or of a ref published with it has the wrong type")
        prompt_ids, epochs, generations, tokens, sample_ids, signatures, digests, stores = columns
        _check_counts(epochs, generations, tokens)
        layouts: list[Layout] = []
        numbers = []
        for store, count, features in zip(stores, tokens, map(_features_of, refs), strict=True):
            content = (store, count, tuple(map(_fields_of, features)))
            number = self._seen.get(content)
            numbers.append(self._see(content, layouts) if number is None else number)
        follow = map(sample_id, prompt_ids, epochs)
        own_ids = [None if own == usual else own for own, usual in zip(sample_ids, follow, strict=True)]
        record = [_once(numbers), prompt_ids, _once(epochs), _once(generations), _once(tokens)]
        record += [_once(own_ids), _once(signatures), _once(digests)]
        while len(record) > _FEWEST_FIELDS and record[-1] == _FOLLOWING[len(record)]:
            record.pop()
        return layouts, record

    def _see(self, content: _Content, layouts: list[Layout]) -> int:
        """The layout's number, from now on known by ``content``; a new layout is added to ``layouts``."""
        layout = _layout_of(content)
        if layout not in self._numbers:
            if not all(map(_is_entry, layout[1])):
                raise ValueError(f"features that cannot be recorded: {layout[1]}; dtypes are {sorted(DTYPE_BYTES)}")
            if self._shared:
                self._numbers, self._seen, self._shared = self._numbers.copy(), self._seen.copy(), False
            layouts.append(layout)
            self._numbers[layout] = len(self._numbers)
        number = self._seen[content] = self._numbers[layout]
        return number


def _is_plain(columns: Sequence[Sequence[Any]], refs: Sequence[SampleRef]) -> bool:
    """Whether every field of every ref has exactly the type it should have; equal values are then the same value."""
    prompt_ids, epochs, generations, tokens, *texts = columns
    specs = [*chain.from_iterable(map(_features_of, refs))]
    return (
        all(_TEXT.issuperset(map(type, column)) for column in (prompt_ids, *texts))
        and all(_COUNT.issuperset(map(type, column)) for column in (epochs, generations, tokens))
        and _SPEC.issuperset(map(type, specs))
        and _COUNT.issuperset(map(type, chain.from_iterable(map(_shape_of, specs))))
    )


def _layout_of(content: _Content) -> Layout:
    store, tokens, features = content
    return store, tuple(
        (name, dtype, norm, (None, *shape[1:]) if shape[:1] == (tokens,) else shape)
        for name, dtype, norm, shape in features
    )


def _once(column: Sequence[Any]) -> Any:
    """The value that stands for a column of equal values; another column as it is."""
    return column[0] if column.count(column[0]) == len(column) else column


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
        if type(record) is not list or len(record) < 2 or list in map(type, record):
            raise ValueError("not the record of one ref")
        number, prompt_id, *others = record
        [ref] = self.decode_batch([number, [prompt_id], *others])
        return ref

    def decode_batch(self, record: Any, *, origin: str = "") -> list[SampleRef]:
        """The refs of a record that was read from ``origin``.

        :raises ValueError: the record is malformed or names a layout that was not recorded.
        """
        if type(record) is not list or not _FEWEST_FIELDS <= len(record) <= _MOST_FIELDS:
            raise ValueError(f"a ref record has {_FEWEST_FIELDS} to {_MOST_FIELDS} fields")
        following: list[Any] = [_FOLLOWING[size] for size in range(len(record) + 1, _MOST_FIELDS + 1)]
        number, prompt_ids, epoch, generation, count, own_id, signature, digest = record + following
        if type(prompt_ids) is not list or not prompt_ids:
            raise ValueError("the prompt ids of a batch are a list")
        size = len(prompt_ids)
        counts = (number, epoch, generation, count)
        numbers, epochs, generations, tokens = (_column(field, size, _COUNT) for field in counts)
        _column(prompt_ids, size, _TEXT)
        own_ids = _column(own_id, size, _TEXT_OR_NONE)
        signatures, digests = (_column(field, size, _TEXT) for field in (signature, digest))
        _check_counts(numbers, epochs, generations, tokens)
        if max(numbers) >= len(self.layouts):
            raise ValueError(f"layout {max(numbers)} was not recorded")
        follow = map(sample_id, prompt_ids, epochs)
        sample_ids = [usual if own is None else own for own, usual in zip(own_ids, follow, strict=True)]
        stores = [self.layouts[number][0] for number in numbers]
        features = list(map(self._features, numbers, tokens))
        columns = (sample_ids, generations, stores, features, tokens, prompt_ids, epochs, signatures, digests)
        return _make_refs(*columns, [origin] * size)

    def _features(self, number: int, num_tokens: int) -> tuple[FeatureSpec, ...]:
        """Refs of one layout and length share their specs."""
        key = (number, num_tokens)
        if key not in self._specs:
            self._specs[key] = tuple(
                FeatureSpec(name, tuple([num_tokens if n is None else n for n in shape]), dtype, norm)  # type: ignore[arg-type]
                for name, dtype, norm, shape in self.layouts[number][1]
            )
        return self._specs[key]


def _make_refs(*columns: Sequence[Any]) -> list[SampleRef]:
    """A ref of every row; a column per field, in the order of SampleRef's.

    Sets the slots column by column, because a frozen dataclass takes three times as long to make itself.
    """
    refs = [object.__new__(SampleRef) for _ in columns[0]]
    for set_field, column in zip(_SETTERS, columns, strict=True):
        deque(map(set_field, refs, column), maxlen=0)
    return refs


def _check_counts(*columns: Sequence[int]) -> None:
    """:raises ValueError: a count is negative or larger than any store or database can keep."""
    if min(map(min, columns)) < 0 or max(map(max, columns)) > _MOST_COUNT:
        raise ValueError(f"layout, epoch, generation and tokens are counts up to {_MOST_COUNT}")


def _column(field: Any, size: int, types: frozenset[type]) -> list[Any]:
    """A value per ref.

    :raises ValueError: there are more or fewer, or one has another type.
    """
    column = field if type(field) is list else [field] * size
    if len(column) != size or not types.issuperset(map(type, column)):
        raise ValueError("layout, epoch, generation and tokens are counts, ids, signature and digest text, one per ref")
    return column


def _is_entry(entry: tuple[Any, ...]) -> bool:
    name, dtype, norm, shape = entry
    texts = type(name) is str and type(dtype) is str and (norm is None or type(norm) is str)
    known = texts and dtype in DTYPE_BYTES and norm in (None, "pre", "post")
    return known and is_plausible_shape([1 if n is None else n for n in shape])
