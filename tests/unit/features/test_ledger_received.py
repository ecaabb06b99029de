# SPDX-License-Identifier: Apache-2.0
"""A ledger that somebody else made, or a disk altered: it answers as it was written, or it is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from specforge_core.contracts import ConfigError, SpecForgeError
from specforge_core.features.ledger import Ledger
from specforge_core.features.ledger_file import checksum_of
from specforge_core.testing.samples import make_ref

_SAMPLES, _WINDOW = 240, 8
_FLIPS = 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def _run(path: Path) -> None:
    """A run in the middle: most samples dealt, some trained, some freed, some seen again, some lost."""
    refs = [replace(make_ref(number), signature=f"{number:043d}=") for number in range(_SAMPLES)]
    ids = [ref.sample_id for ref in refs]
    with closing(Ledger(path, run_id="run")) as ledger:
        ledger.see(refs)
        for window in range(_SAMPLES // _WINDOW - 5):
            ledger.deal(window, ids[window * _WINDOW :][:_WINDOW])
            if window < 20:
                ledger.trained(window)
        ledger.freed(ids[:100])
        ledger.see([replace(ref, generation=2) for ref in refs[50:70]])
        ledger.deal(-1, ["held-out.e0", *ids[-3:]])
        ledger.lost(ids[120:125])


def _answers(path: Path) -> dict[str, Any]:
    """What every method that reads says."""
    ids = [make_ref(number).sample_id for number in range(_SAMPLES)]
    with closing(Ledger(path, run_id="run")) as ledger:
        return {
            "find": ledger.find([*ids, "held-out.e0", "never seen"]),
            "available": ledger.available(),
            "covered": [ledger.covered(step) for step in (0, 10, 1000)],
            "deals": list(ledger.deals()),
        }


def test_no_altered_bit_alters_an_answer(path: Path) -> None:
    """Every byte of the header and some hundred others, spread over the file, with one bit altered."""
    _run(path)
    whole, right = path.read_bytes(), _answers(path)
    seed = random.randrange(1 << 30)
    generator = random.Random(seed)
    places = [*range(100), *(generator.randrange(len(whole)) for _ in range(_FLIPS - 100))]
    refused = 0
    for place in places:
        bit = 1 << generator.randrange(8)
        altered = bytearray(whole)
        altered[place] ^= bit
        for file in path.parent.glob("ledger.sqlite*"):
            file.unlink()
        path.write_bytes(altered)
        try:
            answers = _answers(path)
        except SpecForgeError:
            refused += 1
        else:
            assert answers == right, f"seed {seed}: byte {place} ^ {bit}"
    assert refused > _FLIPS // 4, "most of the file holds rows"


def _left_by_a_kill(path: Path, into: Path) -> Any:
    """Files as a killed process leaves them, most of a run in the log; returns the answers before the last event."""
    into.mkdir()
    refs = [make_ref(number) for number in range(40)]
    with closing(Ledger(path, run_id="run")) as ledger:
        for window in range(5):
            ledger.see(refs[window * 8 :][:8])
            ledger.deal(window, [ref.sample_id for ref in refs[window * 8 :][:8]])
            ledger.trained(window)
        before = _answers(path)
        ledger.freed([refs[0].sample_id])
        for file in path.parent.glob("ledger.sqlite*"):
            shutil.copy(file, into)
    return before


def test_no_altered_bit_of_the_log_a_kill_left_alters_more_than_the_last_event(path: Path, tmp_path: Path) -> None:
    before = _left_by_a_kill(path, tmp_path / "left")
    files = {file.name: file.read_bytes() for file in (tmp_path / "left").iterdir()}

    def answers(wal: bytes) -> Any:
        for file in path.parent.glob("ledger.sqlite*"):
            file.unlink()
        for name, content in {**files, "ledger.sqlite-wal": wal}.items():
            path.with_name(name).write_bytes(content)
        return _answers(path)

    whole = files["ledger.sqlite-wal"]
    right = answers(whole)
    assert right != before
    seed = random.randrange(1 << 30)
    generator = random.Random(seed)
    places = [*range(60), *(generator.randrange(len(whole)) for _ in range(60))]
    refused = 0
    for place in places:
        wal = bytearray(whole)
        wal[place] ^= 1 << generator.randrange(8)
        try:
            assert answers(wal) in (right, before), f"seed {seed}: byte {place}"
        except ConfigError:
            refused += 1
            assert path.with_name("ledger.sqlite-wal").read_bytes() == wal, "it is left as it was"
    assert refused > 90
    for size in range(0, len(whole), 4999):  # torn at any place it is what was recorded up to there
        answers(whole[:size])


@pytest.mark.parametrize("size", [1, 99, 100, 4095, 4096, 8192, 20_000])
def test_a_ledger_cut_short_is_refused(size: int, path: Path) -> None:
    _run(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SpecForgeError):
        _answers(path)


def test_a_row_that_is_altered_while_the_ledger_is_open_is_not_handed_out(path: Path) -> None:
    _run(path)
    with closing(Ledger(path, run_id="run")) as ledger, closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE samples SET ref = replace(ref, '0=', '1=')")
        other.execute("UPDATE deals SET generation = 9")
        other.commit()
        for read in (ledger.available, lambda: ledger.covered(1000), lambda: list(ledger.deals())):
            with pytest.raises(ConfigError, match="a row was altered"):
                read()
        with pytest.raises(ConfigError, match="a row was altered"):
            ledger.find([make_ref(10).sample_id])
        with pytest.raises(ConfigError, match="a row was altered"):
            ledger.deal(900, [make_ref(10).sample_id])


def test_setting_a_flag_does_not_make_an_altered_row_right(path: Path) -> None:
    _run(path)
    with closing(Ledger(path, run_id="run")) as ledger, closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE samples SET generation = 9")
        other.execute("UPDATE deals SET generation = 9")
        other.commit()
        ledger.freed([make_ref(200).sample_id])
        ledger.trained(22)
    with pytest.raises(ConfigError, match="a row was altered"):
        Ledger(path, run_id="run")


# -- what somebody else may have put there -----------------------------------------------------------------------------


def _sql(*statements: str) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            for statement in statements:
                db.execute(statement)
            db.commit()

    return act


def _master(old: str, new: str) -> Callable[[Path], None]:
    """Change the text of the schema itself."""

    def act(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute("UPDATE sqlite_master SET sql = replace(sql, ?, ?)", (old, new))
            db.commit()

    return act


def _bytes(old: bytes, new: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new)) and None


SCHEMAS = {
    "a column that is no text": _bytes(b"deals (sample_id, step)", b"deals (sample_i\xe4, step)"),
    "a name that is no text": _bytes(b"indexlive_samples", b"indexlive_sampl\xe4s"),
    "a trigger": _sql("CREATE TRIGGER t AFTER INSERT ON samples BEGIN DELETE FROM deals; END"),
    "a view": _sql("DROP TABLE run", "CREATE VIEW run AS SELECT 'run' AS run_id"),
    "a table more": _sql("CREATE TABLE more (a)"),
    "an index more": _sql("CREATE INDEX more ON samples (hex(ref))"),
    "a table less": _sql("DROP TABLE layouts"),
    "an index less": _sql("DROP INDEX live_samples"),
    "a virtual table": _sql("CREATE VIRTUAL TABLE more USING fts5(a)"),
    "a default": _master("freed INTEGER NOT NULL DEFAULT 0", "freed INTEGER NOT NULL DEFAULT 1"),
    "a check": _master("checksum INTEGER NOT NULL)", "checksum INTEGER NOT NULL CHECK (abs(checksum)))"),
    "a collation": _master("sample_id TEXT NOT NULL UNIQUE", "sample_id TEXT NOT NULL UNIQUE COLLATE NOCASE"),
    "no SQL": _master("CREATE", "DROP"),
    "statistics": _sql("ANALYZE"),
}


@pytest.mark.parametrize("change", SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_is_not_ours_is_refused(change: Callable[[Path], None], path: Path) -> None:
    _run(path)
    change(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"damaged.*move ledger\.sqlite"):
        Ledger(path, run_id="run")
    assert path.read_bytes() == before


def _layout(text: Any) -> Callable[[Path], None]:
    return _with(lambda db: db.execute("UPDATE layouts SET layout = ?, checksum = ?", (text, checksum_of(0, text))))


def _ref(text: Any, *, generation: Any = 1) -> Callable[[Path], None]:
    """Of the last sample, which is available, with the right checksum."""

    def change(db: sqlite3.Connection) -> None:
        [sample] = db.execute("SELECT sample_id FROM samples ORDER BY place DESC LIMIT 1").fetchone()
        values = (text, generation, checksum_of(sample, generation, text), sample)
        db.execute("UPDATE samples SET ref = ?, generation = ?, checksum = ? WHERE sample_id = ?", values)

    return _with(change)


def _with(change: Callable[[sqlite3.Connection], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            change(db)
            db.commit()

    return act


DEEP = "[" * 100_000
OTHER = json.dumps([0, "prompt-1", 0, 1, 5])
ROWS: dict[str, Callable[[Path], None]] = {
    "layout: no JSON": _layout("x"),
    "layout: nested deep": _layout(DEEP),
    "layout: a number": _layout("1"),
    "layout: entries are a number": _layout('["s", 1]'),
    "layout: a dtype that is a list": _layout('["s", [["a", ["float32"], null, [1]]]]'),
    "layout: dimensions that are a word": _layout('["s", [["a", "float32", null, "x"]]]'),
    "layout: a blob": _layout(b"[]"),
    "layout: missing": _sql("DELETE FROM layouts"),
    "layout: another number": _sql("UPDATE layouts SET number = 7"),
    "layout: twice": _with(
        lambda db: db.execute(
            "INSERT INTO layouts SELECT 1, layout, ? FROM layouts",
            (checksum_of(1, db.execute("SELECT layout FROM layouts").fetchone()[0]),),
        )
    ),
    "layout: far away": _with(
        lambda db: db.execute(
            "INSERT INTO layouts SELECT 1 << 62, layout, ? FROM layouts LIMIT 1",
            (checksum_of(1 << 62, db.execute("SELECT layout FROM layouts").fetchone()[0]),),
        )
    ),
    "ref: no JSON": _ref("x"),
    "ref: nested deep": _ref(DEEP),
    "ref: an object": _ref("{}"),
    "ref: a number": _ref("1"),
    "ref: words for counts": _ref('[0, "p", "0", "1", "5"]'),
    "ref: a layout that is none": _ref('[9, "p", 0, 1, 5]'),
    "ref: a layout before the first": _ref('[-1, "p", 0, 1, 5]'),
    "ref: a list for a name": _ref('[0, ["p", "q"], 0, 1, 5]'),
    "ref: another sample's": _ref(OTHER),
    "ref: a generation of its own": _ref(json.dumps([0, f"prompt-{_SAMPLES - 1}", 0, 1 << 70, 5])),
    "ref: a blob": _ref(b"\xff\xfe"),
    "ref: half a character": _ref('[0, "\\ud800", 0, 1, 5]'),
    "text that is not UTF-8": _sql("UPDATE samples SET ref = CAST(x'fffe' AS TEXT)"),
    "generation: a word": _ref(OTHER, generation="many"),
    "generation: a fraction": _ref(OTHER, generation=1.5),
    "freed: neither": _sql("UPDATE samples SET freed = 2, checksum = checksum | 2"),
    "trained: a word": _sql("UPDATE deals SET trained = 'yes'"),
    "trained: neither": _sql("UPDATE deals SET trained = -1, checksum = -1"),
    "checksum: a blob": _sql("UPDATE deals SET checksum = x'00'"),
    "a value without end": _with(
        lambda db: db.execute("UPDATE samples SET ref = printf('%.*c', 40000000, 'x') WHERE place = 1")
    ),
    "owner: none": _sql("DELETE FROM run"),
    "owner: two": _sql("INSERT INTO run VALUES ('run')"),
    "owner: a blob": _sql("UPDATE run SET run_id = x'72756e'"),
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_rows_that_are_no_rows_of_ours_are_refused(change: Callable[[Path], None], path: Path) -> None:
    _run(path)
    change(path)
    with pytest.raises(ConfigError, match=r"the ledger is damaged: .{1,400}move ledger\.sqlite"):
        _answers(path)


def test_a_link_or_a_pipe_in_the_place_of_a_file_is_neither_followed_nor_waited_for(path: Path) -> None:
    mine = path.with_name("mine")
    _run(path)
    for suffix in ("-wal", "-shm", ""):
        place = path.with_name(path.name + suffix)
        place.unlink(missing_ok=True)
        mine.write_bytes(b"")
        place.symlink_to(mine)
        with pytest.raises(ConfigError, match=rf"sqlite{suffix}: this is a symbolic link"):
            Ledger(path, run_id="run")
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(ConfigError, match=rf"sqlite{suffix}: this is not a regular file"):
            Ledger(path, run_id="run")
        place.unlink()
        os.link(mine, place)
        with pytest.raises(ConfigError, match=rf"sqlite{suffix}: this has a second name"):
            Ledger(path, run_id="run")
        place.unlink()
        assert mine.read_bytes() == b""


def test_a_journal_that_names_a_file_does_not_get_it_deleted(path: Path) -> None:
    """SQLite plays a rollback journal back and then deletes the journal above it, which it names: any file at all."""
    _run(path)
    mine = path.with_name("mine")
    mine.write_text("belongs to somebody")
    name = os.fsencode(mine)
    magic = bytes.fromhex("d9d505f920a163d7")
    head = magic + struct.pack(">5I", 0, 0, path.stat().st_size // 4096, 512, 4096)
    tail = struct.pack(">I", 0x40000000 // 4096 + 1) + name + struct.pack(">2I", len(name), sum(name)) + magic
    path.with_name("ledger.sqlite-journal").write_bytes(head.ljust(512, b"\0") + tail)
    shutil.copytree(path.parent, path.parent / "copy")
    with closing(sqlite3.connect(path.parent / "copy" / path.name)) as db:
        db.execute("SELECT * FROM run").fetchall()
    assert not mine.exists(), "this is how it goes otherwise"
    mine.write_text("belongs to somebody")
    with pytest.raises(ConfigError, match=r"sqlite-journal: no ledger leaves such a journal.*move it away"):
        Ledger(path, run_id="run")
    assert mine.read_text() == "belongs to somebody"


def test_making_a_ledger_makes_no_journal(path: Path) -> None:
    path.with_name("ledger.sqlite-journal").mkdir()  # SQLite could not make one
    with pytest.raises(ConfigError, match="journal"):
        Ledger(path, run_id="run")
    path.with_name("ledger.sqlite-journal").rmdir()
    with closing(Ledger(path, run_id="run")):
        assert sorted(file.name for file in path.parent.iterdir()) == [
            path.name,
            f"{path.name}-shm",
            f"{path.name}-wal",
        ]


def test_pages_that_lead_through_one_another_without_end_are_given_up(path: Path) -> None:
    """The schema as a tree of a few pages, each of which names the next one many times: more rows than can be read."""
    _run(path)
    content = bytearray(path.read_bytes())
    pages, depth, fan = len(content) // 4096, 12, 60
    leaf = bytearray(content[:4096])
    schema = bytes(leaf[100:])  # page 1 but for the file's header, as a leaf of its own
    count = struct.unpack(">H", schema[3:5])[0]
    body = bytearray(4096)
    body[: 8 + 2 * count] = schema[: 8 + 2 * count]
    start = min(struct.unpack(f">{count}H", schema[8 : 8 + 2 * count]))
    body[start:] = leaf[start:]

    def inner(child: int, offset: int) -> bytes:
        page = bytearray(4096)
        cells = [4096 - 5 * (n + 1) for n in range(fan)]
        page[offset : offset + 12] = struct.pack(">BHHHBI", 5, 0, fan, cells[-1], 0, child)
        page[offset + 12 : offset + 12 + 2 * fan] = struct.pack(f">{fan}H", *cells)
        for cell in cells:
            page[cell : cell + 5] = struct.pack(">IB", child, 9)
        return bytes(page)

    first = inner(pages + 1, 100)
    content[100:4096] = first[100:]
    for level in range(depth):
        content += inner(pages + 2 + level, 0)
    content += body
    content[28:32] = struct.pack(">I", len(content) // 4096)
    path.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="damaged"):
        Ledger(path, run_id="run")
    assert time.monotonic() - began < 30
