# SPDX-License-Identifier: Apache-2.0
"""The ledger: every ref a run has seen, the window each sample was dealt to, and what became of it.

It stands beside the loader of rank 0, its only writer. A deal is recorded *before* its window is handed out and
``trained`` at the optimizer boundary, so after a kill at any moment it says which samples the checkpoint covers, which
features still wait, and that no sample was lost or trained twice. One SQLite file in the run directory, on a local
disk (its write-ahead log is shared memory and does not work between machines). ``ledger_file`` opens and checks it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from specforge_core.contracts import SampleRef
from specforge_core.contracts.files import parse_json
from specforge_core.features.ledger_file import (
    LOCK_SECONDS,
    check_ledger,
    checksum,
    create_ledger,
    damaged_ledger,
    refusals,
    refuse_planted,
)
from specforge_core.features.ref_codec import RefDecoder, RefEncoder

_COMPACT = (",", ":")
_PAGE_OF_DEALS = 1000

_SEE = """INSERT INTO samples (sample_id, generation, ref, checksum) VALUES (?, ?, ?, ?)
    ON CONFLICT (sample_id) DO UPDATE
    SET generation = excluded.generation, ref = excluded.ref, freed = 0, checksum = excluded.checksum
    WHERE excluded.generation > samples.generation"""
_FIND = """SELECT samples.ref, samples.freed, deals.step, deals.trained FROM samples LEFT JOIN deals
    ON deals.sample_id = samples.sample_id WHERE samples.sample_id = ? ORDER BY deals.step DESC LIMIT 1"""
_DEAL = """INSERT INTO deals (step, place, sample_id, generation, checksum)
    SELECT ?1, ?2, ?3, known, checksum(?1, ?2, ?3, known, 0)
    FROM (SELECT coalesce((SELECT generation FROM samples WHERE sample_id = ?3), 0) AS known)"""
_TRAINED = "UPDATE deals SET trained = 1, checksum = checksum(step, place, sample_id, generation, 1)"
_FREED = "UPDATE samples SET freed = 1, checksum = checksum(sample_id, generation, ref, 1) WHERE sample_id = ?"
_AVAILABLE = """SELECT ref FROM samples WHERE freed = 0
    AND NOT EXISTS (SELECT 1 FROM deals WHERE deals.sample_id = samples.sample_id) ORDER BY place"""
_COVERED = """SELECT ref FROM samples WHERE freed = 0
    AND (SELECT max(step) FROM deals WHERE deals.sample_id = samples.sample_id) < ? ORDER BY place"""
_DEALS = """SELECT step, sample_id, generation, trained, place FROM deals
    WHERE (step, place) > (?, ?) ORDER BY step, place LIMIT ?"""


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
        with refusals(path):
            refuse_planted(path)
            self._db = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
        with refusals(path), ExitStack() as opened:
            opened.callback(self._db.close)
            self._open(run_id)
            opened.pop_all()

    def _open(self, run_id: str) -> None:
        self._db.create_function("checksum", -1, checksum, deterministic=True)
        if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            check_ledger(self._db, self._path, run_id=run_id)
            self._db.execute("PRAGMA journal_mode = WAL")
        else:
            self._db.execute("PRAGMA journal_mode = WAL")
            create_ledger(self._db, run_id=run_id)
        self._db.execute("PRAGMA synchronous = FULL")
        self._decoder = RefDecoder()
        for (layout,) in self._db.execute("SELECT layout FROM layouts ORDER BY number"):
            try:
                self._decoder.add_layout(parse_json(layout))
            except ValueError as error:
                raise damaged_ledger(self._path, str(error)) from error
        self._encoder = RefEncoder(self._decoder.layouts)

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
        rows, layouts = [], []
        for ref in refs:
            layout, record = encoder.encode(ref)
            layouts += [json.dumps(layout, separators=_COMPACT, ensure_ascii=False)] if layout is not None else []
            text = json.dumps(record, separators=_COMPACT, ensure_ascii=False)
            rows.append((ref.sample_id, ref.generation, text, checksum(ref.sample_id, ref.generation, text, 0)))
        numbered = list(enumerate(layouts, start=len(self._decoder.layouts)))
        with self._transaction():
            self._db.executemany("INSERT INTO layouts VALUES (?1, ?2, checksum(?1, ?2))", numbered)
            self._db.executemany(_SEE, rows)
        self._encoder = encoder
        for text in layouts:
            self._decoder.add_layout(json.loads(text))

    def find(self, sample_ids: Sequence[str]) -> dict[str, LedgerEntry]:
        """What is known of these samples; those never seen, or lost and not seen since, are left out."""
        entries = {}
        with refusals(self._path):
            for sample_id in sample_ids:
                for ref, freed, window, trained in self._db.execute(_FIND, (sample_id,)):
                    entries[sample_id] = LedgerEntry(self._decode(ref), window, bool(trained), bool(freed))
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
            self._db.executemany(_DEAL, [(window, place, sample) for place, sample in enumerate(sample_ids)])

    def trained(self, window: int) -> None:
        """The optimizer has made its step with this window.

        :raises ValueError: it was never dealt.
        """
        with self._transaction():
            if not self._db.execute(f"{_TRAINED} WHERE step = ?", (window,)).rowcount:
                raise ValueError(f"window {window} was trained but never dealt")

    def rewind(self, step: int) -> None:
        """The run goes on after ``step`` finished windows, all trained, recorded or not: later deals are undone."""
        with self._transaction():
            self._db.execute("DELETE FROM deals WHERE step >= ?", (step,))
            self._db.execute(f"{_TRAINED} WHERE step = ? - 1 AND step >= 0", (step,))

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
        while True:
            with refusals(self._path):
                rows = self._db.execute(_DEALS, (*after, _PAGE_OF_DEALS)).fetchall()
            if not rows:
                return
            for window, sample_id, generation, trained, _ in rows:
                yield window, sample_id, generation, bool(trained)
            after = (rows[-1][0], rows[-1][-1])

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    def _for_each(self, statement: str, sample_ids: Sequence[str]) -> None:
        with self._transaction():
            self._db.executemany(statement, [(sample_id,) for sample_id in sample_ids])

    def _refs(self, query: str, parameters: tuple[int, ...]) -> list[SampleRef]:
        with refusals(self._path):
            return [self._decode(ref) for (ref,) in self._db.execute(query, parameters)]

    def _decode(self, text: str) -> SampleRef:
        try:
            return self._decoder.decode(parse_json(text))
        except ValueError as error:
            raise damaged_ledger(self._path, str(error)) from error


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
