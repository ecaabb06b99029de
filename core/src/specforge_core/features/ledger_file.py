# SPDX-License-Identifier: Apache-2.0
"""The file of the ledger: its schema, the checksums of its rows, and how it is opened.

A run directory may come from somebody else, and a disk may alter a byte. So a ledger is opened only where it is a
regular file, holds exactly our schema (a trigger or a view would be SQL of somebody else's) and is whole as SQLite sees
it, and every row has the checksum it was written with. Rows are compared again whenever they are read.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from specforge_core.contracts import ConfigError, DataError, SpecForgeError
from specforge_core.contracts.files import check_regular
from specforge_core.features.ledger_wal import find_fault

_APPLICATION_ID = 0x53464C31  # "SFL1", in the file's header
_FORMAT = 2
_LOCK_SECONDS = 5.0
_MAX_VALUE_BYTES = 16 << 20
"""The longest text in a row: a ref has some hundred bytes."""
_PLANTED = (errno.ELOOP, errno.EINVAL, errno.EMLINK)
"""What ``check_regular`` says of what is no file of ours."""
_STEPS_PER_BYTE, _STEPS_BETWEEN = 20, 100_000
"""Checking a ledger takes SQLite half a step of its machine per byte. A file whose pages lead through one another again
and again takes steps without end, and is given up."""

# A sample's features are *live* until they are freed. Finished runs have millions of samples and few live ones, so
# whatever asks for live ones goes through an index that holds no others.
_SCHEMA = (
    "CREATE TABLE run (run_id TEXT NOT NULL)",
    "CREATE TABLE layouts (number INTEGER PRIMARY KEY, layout TEXT NOT NULL, checksum INTEGER NOT NULL)",
    """CREATE TABLE samples (
        place INTEGER PRIMARY KEY, sample_id TEXT NOT NULL UNIQUE, generation INTEGER NOT NULL, ref TEXT NOT NULL,
        freed INTEGER NOT NULL DEFAULT 0, checksum INTEGER NOT NULL)""",
    "CREATE INDEX live_samples ON samples (freed) WHERE freed = 0",
    """CREATE TABLE deals (
        step INTEGER NOT NULL, place INTEGER NOT NULL, sample_id TEXT NOT NULL, generation INTEGER NOT NULL,
        trained INTEGER NOT NULL DEFAULT 0, checksum INTEGER NOT NULL, PRIMARY KEY (step, place)) WITHOUT ROWID""",
    "CREATE INDEX deals_of_sample ON deals (sample_id, step)",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_FORMAT}",
)
_SCHEMA_ROWS = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"


class RowKind(NamedTuple):
    """The columns of a row as they are read, and their types. The last two are its flag and its checksum."""

    columns: str
    types: tuple[type, ...]


LAYOUT = RowKind("number, layout, 0, checksum", (int, str, int, int))
SAMPLE = RowKind("sample_id, generation, ref, freed, checksum", (str, int, str, int, int))
DEAL = RowKind("step, place, sample_id, generation, trained, checksum", (int, int, str, int, int, int))
_TABLES = {"layouts": LAYOUT, "samples": SAMPLE, "deals": DEAL}


def checksum_of(*fields: int | str) -> int:
    """What the row of these fields is recorded with while its flag (freed, trained) is 0.

    The lowest bit is the flag's, so that ``checksum | 1`` is the checksum once it is set, and an altered row does not
    become a right one by having its flag set.
    """
    return xxh3_64_intdigest("\0".join(map(str, fields)).encode()) >> 2 << 1


def is_intact(kind: RowKind, row: tuple[Any, ...]) -> bool:
    """Whether a row has the types and the checksum it should have."""
    if tuple(map(type, row)) != kind.types:
        return False
    *fields, flag, checksum = row
    return flag in (0, 1) and checksum == checksum_of(*fields) | flag


def open_ledger_file(path: Path, *, run_id: str) -> sqlite3.Connection:
    """
    :raises ConfigError: the file belongs to another run, another format, or is damaged or something else than a file.
    :raises DataError: it cannot be opened or made.
    """
    with refusals(path), ExitStack() as opened:
        _check_files(path)
        db = sqlite3.connect(path, timeout=_LOCK_SECONDS, isolation_level=None)
        opened.callback(db.close)
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        for setting in ("trusted_schema = OFF", "cell_size_check = ON"):
            db.execute(f"PRAGMA {setting}")
        with _limited_steps(db, path):
            is_new = _is_new(db, path)
            if not is_new:
                _check(db, path, run_id=run_id)
        if is_new:
            db.execute("PRAGMA journal_mode = MEMORY")  # else making the file would leave a journal beside it
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if is_new:
            _make(db, run_id)
        opened.pop_all()
        return db


def _make(db: sqlite3.Connection, run_id: str) -> None:
    with db:
        for statement in ("BEGIN IMMEDIATE", *_SCHEMA):
            db.execute(statement)
        db.execute("INSERT INTO run VALUES (?)", (run_id,))


def _check_files(path: Path) -> None:
    """SQLite opens its files by name: none may lead elsewhere. A rollback journal may name a file to be deleted; a
    ledger has none, and one that lies there is not played back."""
    wal = path.with_name(f"{path.name}-wal")
    for file in (path, wal, path.with_name(f"{path.name}-shm")):
        try:
            check_regular(file)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in _PLANTED:
                raise
            raise _not_ours(file, f"this {error.strerror}") from error
    journal = path.with_name(f"{path.name}-journal")
    with suppress(FileNotFoundError):
        journal.lstat()
        raise _not_ours(journal, "no ledger leaves such a journal, which may be somebody else's")
    if fault := find_fault(wal):
        raise damaged(path, fault)


def _not_ours(path: Path, fault: str) -> ConfigError:
    return ConfigError(fault, where=str(path), hint="move it away, or choose another run.directory")


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    """Nothing was ever recorded: an empty file, or one whose maker was killed before it had made the schema."""
    marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    is_empty = pages == 1 or path.stat().st_size == 0  # of a file that is shorter than a page, SQLite sees none
    return is_empty and marks == [0, 0] and not db.execute(_SCHEMA_ROWS).fetchall()


def _check(db: sqlite3.Connection, path: Path, *, run_id: str) -> None:
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if found != [_APPLICATION_ID, _FORMAT]:
        raise ConfigError(
            f"this is no ledger of format {_FORMAT}, which this version keeps",
            where=str(path),
            hint="go on with the version of specforge that began the run, or choose another run.directory",
        )
    if db.execute(_SCHEMA_ROWS).fetchall() != _expected_schema():
        raise damaged(path, "its tables, indexes, views or triggers are not the ones a ledger has")
    owners = db.execute("SELECT run_id FROM run").fetchall()
    if len(owners) != 1 or type(owners[0][0]) is not str:
        raise damaged(path, "it does not say which run it belongs to")
    if owners != [(run_id,)]:
        raise ConfigError(
            f"this ledger belongs to run {owners[0][0]!r:.200}, not to {run_id!r}",
            where=str(path),
            hint="choose another run.directory, or set run.id back to resume that run",
        )
    if (fault := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise damaged(path, fault)
    for table, kind in _TABLES.items():
        for row in db.execute(f"SELECT {kind.columns} FROM {table}"):
            if not is_intact(kind, row):
                raise altered(path, row)


def _expected_schema() -> list[tuple[str, str, str, str | None]]:
    with ExitStack() as opened:
        db = sqlite3.connect(":memory:")
        opened.callback(db.close)
        for statement in _SCHEMA:
            db.execute(statement)
        return db.execute(_SCHEMA_ROWS).fetchall()


@contextmanager
def _limited_steps(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Interrupt SQLite where it takes more steps than checking a file of this size can take."""
    files = [path.with_name(path.name + suffix) for suffix in ("", "-wal")]
    size = sum(file.stat().st_size for file in files if file.exists())
    left = 100 + size * _STEPS_PER_BYTE // _STEPS_BETWEEN

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    db.set_progress_handler(is_over, _STEPS_BETWEEN)
    yield
    db.set_progress_handler(None, 0)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """SQLite's errors, but for those that only a bug can cause, and the file system's, as ours."""
    try:
        yield
    except SpecForgeError:
        raise
    except OSError as error:
        raise _cannot_be_used(path, f"{error.filename}: {error.strerror}") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
            raise
        raise _refusal(error, path) from error
    except UnicodeDecodeError as error:  # SQLite's message quotes what is not text
        raise damaged(path, f"its schema is not UTF-8: {error.object!r:.200}") from error


_OF_DAMAGED_FILES = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # "unsupported file format"; our statements are right
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_INTERRUPT,
}


def _refusal(error: sqlite3.DatabaseError, path: Path) -> SpecForgeError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)  # none: text in it is not UTF-8
    code &= 0xFF  # the low byte is the kind, the others its detail
    if code in _OF_DAMAGED_FILES:
        return damaged(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        hint = "end the process that has the ledger open (one trains a run at a time) and start again"
        return DataError(
            f"another process has locked the ledger for {_LOCK_SECONDS:g} seconds", where=str(path), hint=hint
        )
    return _cannot_be_used(path, str(error))


def _cannot_be_used(path: Path, fault: str) -> DataError:
    hint = "free space or correct the permissions there, then start the same command again: it resumes"
    return DataError(f"the ledger cannot be written: {fault}", where=str(path), hint=hint)


def altered(path: Path, row: tuple[Any, ...]) -> ConfigError:
    """The error for a row that has not the checksum it was written with."""
    return damaged(path, f"a row was altered: {row!r:.200}")


def damaged(path: Path, fault: str) -> ConfigError:
    """The error for a ledger that cannot be believed."""
    return ConfigError(
        f"the ledger is damaged: {' '.join(fault.split())}",
        where=str(path),
        hint=f"move {path.name}* away and start again: a resumed run captures again what it does not know of",
    )
