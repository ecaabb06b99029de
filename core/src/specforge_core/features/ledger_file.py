# SPDX-License-Identifier: Apache-2.0
"""The file behind the ledger: its tables, and the check of everything in it before anything is believed.

Each row has a checksum over its fields. SQLite's own check finds pages and indexes that do not agree, the checksums
find altered values, and comparing the schema finds whatever else somebody put there (a trigger, say, that would run).
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from xxhash import xxh3_64_intdigest

from specforge_core.contracts import ConfigError, DataError, SpecForgeError
from specforge_core.contracts.files import open_regular

_APPLICATION_ID = 0x53464C31  # "SFL1", in the file's header
_FORMAT = 2
_LOCK_SECONDS = 5.0

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

_CHECKED: Mapping[str, str] = {
    "layouts": "number, layout",
    "samples": "sample_id, generation, ref, freed",
    "deals": "step, place, sample_id, generation, trained",
}
"""The fields that a row's checksum is over."""


def checksum(*fields: object) -> int:
    """Of a row's fields: 63 bits, since SQLite's integers have a sign."""
    return xxh3_64_intdigest(json.dumps(fields).encode()) >> 1


def refuse_planted(path: Path) -> None:
    """Also removes a rollback journal, which a ledger needs none of once it is begun: SQLite would delete whatever file
    the journal names as its "super-journal".

    :raises OSError: a link, or something else that is no file, stands where SQLite would write.
    """
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if os.path.lexists(file):
            os.close(open_regular(file, os.O_RDWR))


def create_ledger(db: sqlite3.Connection, *, run_id: str) -> None:
    """Make the tables of a new ledger."""
    with db:
        for statement in ("BEGIN IMMEDIATE", *_SCHEMA):
            db.execute(statement)
        db.execute("INSERT INTO run VALUES (?)", (run_id,))


def check_ledger(db: sqlite3.Connection, path: Path, *, run_id: str) -> None:
    """Check all of an existing ledger.

    :raises ConfigError: it belongs to another run, another format, or is damaged.
    """
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON"):
        db.execute(f"PRAGMA {pragma}")
    found = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    if found != [_APPLICATION_ID, _FORMAT]:
        raise ConfigError(
            f"this is no ledger of format {_FORMAT}, which this version keeps",
            where=str(path),
            hint="go on with the version of specforge that began the run, or choose another run.directory",
        )
    if _schema(db) != _expected_schema():
        raise damaged_ledger(path, "its tables are not those of a ledger")
    if (fault := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise damaged_ledger(path, fault)
    for table, fields in _CHECKED.items():
        for *values, expected in db.execute(f"SELECT {fields}, checksum FROM {table}"):
            if any(isinstance(value, bytes) for value in values) or checksum(*values) != expected:
                raise damaged_ledger(path, f"a row of {table} is not what was written: {values!r:.120}")
    owners = [owner for (owner,) in db.execute("SELECT run_id FROM run")]
    if owners != [run_id]:
        raise ConfigError(
            f"this ledger belongs to run {', '.join(map(repr, owners))}, not to {run_id!r}",
            where=str(path),
            hint="choose another run.directory, or set run.id back to resume that run",
        )


def _schema(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    return sorted(db.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master"))


def _expected_schema() -> list[tuple[str, ...]]:
    db = sqlite3.connect(":memory:")
    try:
        for statement in _SCHEMA:
            db.execute(statement)
        return _schema(db)
    finally:
        db.close()


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """SQLite's errors, but for those that only a bug can cause, as ours."""
    try:
        yield
    except OSError as error:
        raise damaged_ledger(path, f"{error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:  # a message of SQLite's that quotes what is in the file
        raise damaged_ledger(path, str(error)) from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.IntegrityError):
            raise
        raise _refusal(error, path) from error


def _refusal(error: sqlite3.DatabaseError, path: Path) -> SpecForgeError:
    if not hasattr(error, "sqlite_errorcode"):  # not SQLite's own: text that is no text
        return damaged_ledger(path, str(error))
    code = error.sqlite_errorcode & 0xFF  # the low byte is the kind, the others its detail
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged_ledger(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        hint = "end the process that has the ledger open (one trains a run at a time) and start again"
        return DataError(
            f"another process has locked the ledger for {_LOCK_SECONDS:g} seconds", where=str(path), hint=hint
        )
    hint = "free space or correct the permissions there, then start the same command again: it resumes"
    return DataError(f"the ledger cannot be written: {error}", where=str(path), hint=hint)


def damaged_ledger(path: Path, fault: str) -> ConfigError:
    return ConfigError(
        f"the ledger is damaged: {' '.join(fault.split())}",
        where=str(path),
        hint=f"move {path.name}* away and start again: a resumed run captures again what it does not know of",
    )
