# SPDX-License-Identifier: Apache-2.0
"""The ledger: every ref a run has seen, the window each sample was dealt to, and what became of it.

It stands beside the loader of rank 0, its only writer. A deal is recorded *before* its window is handed out and
``trained`` at the optimizer boundary, so after a kill at any moment it says which samples the checkpoint covers, which
features still wait, and that no sample was lost or trained twice. One SQLite file in the run directory, on a local
disk (its write-ahead log is shared memory and does not work between machines).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

from specforge_core.contracts import SampleRef
from specforge_core.contracts.files import parse_json
from specforge_core.features.ledger_file import (
    DEAL,
    LAYOUT,
    SAMPLE,
    RowKind,
    altered,
    checksum_of,
    damaged,
    is_intact,
    open_ledger_file,
    refusals,
)
from specforge_core.features.ref_codec import RefDecoder, RefEncoder

_COMPACT = (",", ":")
_PAGE_OF_DEALS = 1000

_SAMPLE = SAMPLE.columns
_FIND_SAMPLE = f"SELECT {_SAMPLE} FROM samples WHERE sample_id = ?"
_FIND_DEAL = f"SELECT {DEAL.columns} FROM deals WHERE sample_id = ? ORDER BY step DESC LIMIT 1"
_SEE = """INSERT INTO samples (sample_id, generation, ref, checksum) VALUES (?, ?, ?, ?)
    ON CONFLICT (sample_id) DO UPDATE
    SET generation = excluded.generation, ref = excluded.ref, freed = 0, checksum = excluded.checksum
    WHERE excluded.generation > samples.generation"""
_DEAL = "INSERT INTO deals (step, place, sample_id, generation, checksum) VALUES (?, ?, ?, ?, ?)"
_TRAINED = "UPDATE deals SET trained = 1, checksum = checksum | 1 WHERE step = ?"
_FREED = "UPDATE samples SET freed = 1, checksum = checksum | 1 WHERE sample_id = ?"
_AVAILABLE = f"""SELECT {_SAMPLE} FROM samples WHERE freed = 0
    AND NOT EXISTS (SELECT 1 FROM deals WHERE deals.sample_id = samples.sample_id) ORDER BY place"""
_COVERED = f"""SELECT {_SAMPLE} FROM samples WHERE freed = 0
    AND (SELECT max(step) FROM deals WHERE deals.sample_id = samples.sample_id) < ? ORDER BY place"""
_DEALS = f"SELECT {DEAL.columns} FROM deals WHERE (step, place) > (?, ?) ORDER BY step, place LIMIT ?"


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What is known of one sample.

    :param window: the window it was dealt to last and that still stands; None: to none.
    :param trained: that window was trained.
    :param freed: its features were deleted, because nothing would need them again.
    """

    ref: SampleRef
    window: int | None
    trained: bool
    freed: bool


class Ledger:
    """One run's ledger. Every method has committed, durably, when it returns. To be used from one thread.

    :param path: the file; made where there is none.
    :raises ConfigError: the file belongs to another run, another format, or is damaged.
    :raises DataError: from any method: the disk is full, the file cannot be written, or another process holds it.
    """

    def __init__(self, path: Path, *, run_id: str) -> None:
        self._path = path
        self._db = open_ledger_file(path, run_id=run_id)
        self._decoder = RefDecoder()
        with ExitStack() as opened:
            opened.callback(self._db.close)
            for number, layout, _ in self._rows(LAYOUT, f"SELECT {LAYOUT.columns} FROM layouts ORDER BY number", ()):
                self._add_layout(number, layout)
            self._encoder = RefEncoder(self._decoder.layouts)
            if len(self._encoder.layouts) != len(self._decoder.layouts):
                raise damaged(path, "a layout is recorded twice")
            opened.pop_all()

    def _add_layout(self, number: int, layout: str) -> None:
        if number != len(self._decoder.layouts):
            raise damaged(self._path, f"layout {len(self._decoder.layouts)} is missing")
        try:
            self._decoder.add_layout(parse_json(layout))
        except (ValueError, TypeError) as error:
            raise damaged(self._path, f"layout {number}: {error}") from error

    def _rows(self, kind: RowKind, query: str, parameters: tuple[int | str, ...]) -> Iterator[tuple[Any, ...]]:
        """Rows of a kind without their checksums, which are right.

        :raises ConfigError: a row was altered.
        """
        with refusals(self._path):
            for row in self._db.execute(query, parameters):
                if not is_intact(kind, row):
                    raise altered(self._path, row)
                yield row[:-1]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is executed inside becomes durable at its end, or none of it."""
        with refusals(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def see(self, refs: Sequence[SampleRef]) -> None:
        """Record refs. One of a newer generation takes the recorded one's place: its features are there (again), and
        the sample stays dealt where it was. One that is not newer changes nothing.

        :raises TypeError: a ref holds anything but metadata.
        """
        encoder = self._encoder.copy()
        samples, layouts = [], []
        for ref in refs:
            layout, record = encoder.encode(ref)
            layouts += [json.dumps(layout, separators=_COMPACT, ensure_ascii=False)] if layout is not None else []
            row = (ref.sample_id, ref.generation, json.dumps(record, separators=_COMPACT, ensure_ascii=False))
            samples.append((*row, checksum_of(*row)))
        first = len(self._decoder.layouts)
        numbered = [(number, layout, checksum_of(number, layout)) for number, layout in enumerate(layouts, first)]
        with self._transaction():
            self._db.executemany("INSERT INTO layouts VALUES (?, ?, ?)", numbered)
            self._db.executemany(_SEE, samples)
        self._encoder = encoder
        for text in layouts:
            self._decoder.add_layout(json.loads(text))

    def find(self, sample_ids: Sequence[str]) -> dict[str, LedgerEntry]:
        """What is known of these samples; those never seen, or lost and not seen since, are left out."""
        entries = {}
        for wanted in sample_ids:
            for sample in self._rows(SAMPLE, _FIND_SAMPLE, (wanted,)):
                deal = next(self._rows(DEAL, _FIND_DEAL, (wanted,)), None)
                window, trained = (None, False) if deal is None else (deal[0], bool(deal[-1]))
                entries[wanted] = LedgerEntry(self._decode(sample), window, trained, bool(sample[-1]))
        return entries

    def deal(self, window: int, sample_ids: Sequence[str]) -> None:
        """Record which samples a window consists of, in order, in place of what it held before.

        A sample whose features nobody has (one set aside, a member of zero weight) is dealt as generation 0. Windows
        below 0 are of held-out samples, which are copied again where their copies were removed.

        :raises ValueError: the window was trained already.
        """
        with self._transaction():
            trained = "SELECT 1 FROM deals WHERE step = ? AND step >= 0 AND trained = 1"
            if self._db.execute(trained, (window,)).fetchone():
                raise ValueError(f"window {window} was trained and is dealt again")
            self._db.execute("DELETE FROM deals WHERE step = ?", (window,))
            generations = [self._generation(sample) for sample in sample_ids]
            rows = zip(repeat(window), count(), sample_ids, generations, strict=False)
            self._db.executemany(_DEAL, [(*row, checksum_of(*row)) for row in rows])

    def trained(self, window: int) -> None:
        """The optimizer has made its step with this window.

        :raises ValueError: it was never dealt.
        """
        with self._transaction():
            if not self._db.execute(_TRAINED, (window,)).rowcount:
                raise ValueError(f"window {window} was trained but never dealt")

    def rewind(self, step: int) -> None:
        """The run goes on after ``step`` finished windows, all trained, recorded or not: later deals are undone."""
        with self._transaction():
            self._db.execute("DELETE FROM deals WHERE step >= ?", (step,))
            self._db.execute(f"{_TRAINED} - 1 AND step >= 0", (step,))

    def available(self) -> list[SampleRef]:
        """Refs dealt to no window and not freed, in the order they came: what need not be captured again."""
        return self._refs(_AVAILABLE, ())

    def covered(self, step: int) -> list[SampleRef]:
        """Refs not freed that no window from ``step`` on was dealt, but an earlier one was: what may be freed once a
        checkpoint of ``step`` is durable."""
        return self._refs(_COVERED, (step,))

    def freed(self, sample_ids: Sequence[str]) -> None:
        """Their features were deleted."""
        self._for_each(_FREED, sample_ids)

    def lost(self, sample_ids: Sequence[str]) -> None:
        """Their features are gone though they are wanted: forget the refs, so that whatever is published next counts,
        of any generation. Deals stand."""
        self._for_each("DELETE FROM samples WHERE sample_id = ?", sample_ids)

    def deals(self) -> Iterator[tuple[int, str, int, bool]]:
        """(window, sample id, its generation when dealt, trained), in the order of windows and of places in them."""
        after = (-1, -1)
        while rows := list(self._rows(DEAL, _DEALS, (*after, _PAGE_OF_DEALS))):
            for window, _, sample_id, generation, trained in rows:
                yield window, sample_id, generation, bool(trained)
            after = rows[-1][:2]

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    def _for_each(self, statement: str, sample_ids: Sequence[str]) -> None:
        with self._transaction():
            self._db.executemany(statement, [(sample_id,) for sample_id in sample_ids])

    def _refs(self, query: str, parameters: tuple[int, ...]) -> list[SampleRef]:
        return [self._decode(row) for row in self._rows(SAMPLE, query, parameters)]

    def _generation(self, sample_id: str) -> int:
        """The recorded one; 0 where nobody has the sample's features."""
        sample = next(self._rows(SAMPLE, _FIND_SAMPLE, (sample_id,)), None)
        return 0 if sample is None else int(sample[1])

    def _decode(self, sample: tuple[Any, ...]) -> SampleRef:
        sample_id, generation, text, _ = sample
        try:
            ref = self._decoder.decode(parse_json(text))
        except (ValueError, TypeError) as error:
            raise damaged(self._path, f"the ref of {sample_id!r:.200}: {error}") from error
        if (ref.sample_id, ref.generation) != (sample_id, generation):
            raise damaged(self._path, f"the ref of {sample_id!r:.200} is another sample's or generation's")
        return ref


class NoLedger:
    """What the ranks that keep no ledger are given: it takes everything and knows nothing."""

    def see(self, refs: Sequence[SampleRef]) -> None: ...

    def find(self, sample_ids: Sequence[str]) -> dict[str, LedgerEntry]:
        return {}

    def deal(self, window: int, sample_ids: Sequence[str]) -> None: ...

    def trained(self, window: int) -> None: ...

    def rewind(self, step: int) -> None: ...

    def available(self) -> list[SampleRef]:
        return []

    def covered(self, step: int) -> list[SampleRef]:
        return []

    def freed(self, sample_ids: Sequence[str]) -> None: ...

    def lost(self, sample_ids: Sequence[str]) -> None: ...

    def deals(self) -> Iterator[tuple[int, str, int, bool]]:
        return iter(())

    def close(self) -> None: ...
