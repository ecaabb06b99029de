# SPDX-License-Identifier: Apache-2.0
"""The ledger: what it says of a sample after each event, and that no kill, full disk or stranger makes it lie."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from specforge_core.contracts import ConfigError, DataError, SampleRef
from specforge_core.features import ledger_file
from specforge_core.features.ledger import Ledger, NoLedger
from specforge_core.testing.samples import make_ref

REF, OTHER = make_ref(0), make_ref(1)
A, B = REF.sample_id, OTHER.sample_id
NEWER = make_ref(0, generation=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, run_id="run")) as opened:
        yield opened


@dataclass(frozen=True)
class Case:
    """Events after REF and OTHER were seen, and what is then said of REF."""

    name: str
    events: Callable[[Ledger], None]
    generation: int = 1
    window: int | None = None
    trained: bool = False
    freed: bool = False
    available: bool = False
    covered: bool = False  # by a checkpoint of step 1


def events(*calls: tuple[str, tuple[object, ...]]) -> Callable[[Ledger], None]:
    return lambda ledger: [getattr(ledger, name)(*arguments) for name, arguments in calls] and None


def see(*refs: SampleRef) -> tuple[str, tuple[object, ...]]:
    return "see", (refs,)


DEAL, TRAINED, FREED, LOST = ("deal", (0, [A])), ("trained", (0,)), ("freed", ([A],)), ("lost", ([A],))

CASES = [
    Case("seen", events(), available=True),
    Case("seen twice", events(see(REF)), available=True),
    Case("seen newer", events(see(NEWER)), generation=2, available=True),
    Case("seen older", events(see(NEWER), see(REF)), generation=2, available=True),
    Case("both in one call", events(see(NEWER, REF)), generation=2, available=True),
    Case("dealt", events(DEAL), window=0, covered=True),
    Case("dealt, then seen newer", events(DEAL, see(NEWER)), generation=2, window=0, covered=True),
    Case("dealt later", events(("deal", (1, [A]))), window=1),
    Case("trained", events(DEAL, TRAINED), window=0, trained=True, covered=True),
    Case("freed", events(DEAL, TRAINED, FREED), window=0, trained=True, freed=True),
    Case("freed, then redelivered", events(DEAL, TRAINED, FREED, see(REF)), window=0, trained=True, freed=True),
    Case("freed, then rewound", events(DEAL, TRAINED, FREED, ("rewind", (0,))), freed=True),
    Case(
        "freed, rewound, captured again",
        events(DEAL, TRAINED, FREED, ("rewind", (0,)), see(NEWER)),
        generation=2,
        available=True,
    ),
    Case("rewound to before", events(DEAL, TRAINED, ("rewind", (0,))), available=True),
    Case("rewound to after", events(DEAL, TRAINED, ("rewind", (1,))), window=0, trained=True, covered=True),
    Case("killed after the checkpoint", events(DEAL, ("rewind", (1,))), window=0, trained=True, covered=True),
    Case("window dealt differently", events(DEAL, ("deal", (0, [B]))), available=True),
    Case("second epoch", events(DEAL, TRAINED, ("deal", (5, [A]))), window=5),
    Case(
        "second epoch undone",
        events(DEAL, TRAINED, ("deal", (5, [A])), ("rewind", (5,))),
        window=0,
        trained=True,
        covered=True,
    ),
    Case("lost, then seen", events(DEAL, see(NEWER), LOST, see(REF)), generation=1, window=0, covered=True),
    Case("lost undealt, then seen", events(see(NEWER), LOST, see(REF)), generation=1, available=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("reopened", [False, True], ids=["open", "reopened"])
def test_what_is_known_of_a_sample(case: Case, reopened: bool, path: Path) -> None:
    ledger = Ledger(path, run_id="run")
    ledger.see([REF, OTHER])
    case.events(ledger)
    if reopened:
        ledger.close()
        ledger = Ledger(path, run_id="run")
    with closing(ledger):
        entry = ledger.find([A])[A]
        assert entry.ref == replace(REF, generation=case.generation)
        assert (entry.window, entry.trained, entry.freed) == (case.window, case.trained, case.freed)
        assert (entry.ref in ledger.available()) == case.available
        assert (entry.ref in ledger.covered(1)) == case.covered


def test_a_lost_sample_is_known_no_more_but_stays_dealt(ledger: Ledger) -> None:
    ledger.see([REF, OTHER])
    ledger.deal(0, [A, B])
    ledger.lost([A])
    assert list(ledger.find([A, B])) == [B]
    assert (ledger.available(), ledger.covered(1)) == ([], [OTHER])
    assert list(ledger.deals()) == [(0, A, 1, False), (0, B, 1, False)]


def test_deals_are_listed_in_order_with_the_generation_dealt(ledger: Ledger) -> None:
    ledger.see([REF, OTHER])
    ledger.deal(10, ["nobody has it", A])
    ledger.deal(2, [B, A])
    ledger.trained(2)
    ledger.see([NEWER])
    assert list(ledger.deals()) == [
        (2, B, 1, True),
        (2, A, 1, True),
        (10, "nobody has it", 0, False),
        (10, A, 1, False),
    ]


def test_a_long_list_of_deals_is_whole(ledger: Ledger) -> None:
    ids = [f"p{n}" for n in range(703)]
    for window in range(3):
        ledger.deal(window, ids)
    assert [(window, sample) for window, sample, *_ in ledger.deals()] == [(w, i) for w in range(3) for i in ids]


def test_available_and_covered_are_in_the_order_refs_came(ledger: Ledger) -> None:
    refs = [make_ref(number) for number in (7, 3, 9, 1)]
    ledger.see(refs)
    assert ledger.available() == refs
    ledger.deal(0, [ref.sample_id for ref in reversed(refs)])
    assert ledger.covered(1) == refs


def test_refs_come_back_as_they_were(ledger: Ledger, path: Path) -> None:
    odd = replace(make_ref(3), sample_id="søster/…", signature="c2lnbmVk", store="another")
    empty = replace(make_ref(4), features=(), num_tokens=0)
    ledger.see([REF, odd])
    ledger.see([empty])
    ledger.close()
    with closing(Ledger(path, run_id="run")) as reopened:
        reopened.see([OTHER])
        assert reopened.available() == [REF, odd, empty, OTHER]


@pytest.mark.parametrize(
    "misuse", [events(DEAL, TRAINED, DEAL), events(("trained", (3,)))], ids=["trained is dealt again", "never dealt"]
)
def test_training_twice_or_what_was_not_dealt_is_a_bug(misuse: Callable[[Ledger], None], ledger: Ledger) -> None:
    ledger.see([REF])
    with pytest.raises(ValueError, match="window"):
        misuse(ledger)
    ledger.see([OTHER])
    assert set(ledger.find([A, B])) == {A, B}


def test_a_ref_that_holds_more_than_metadata_is_refused_whole(ledger: Ledger) -> None:
    with pytest.raises(TypeError):
        ledger.see([REF, replace(OTHER, store=object())])  # type: ignore[arg-type]
    assert ledger.available() == []
    ledger.see([OTHER])
    assert ledger.available() == [OTHER]


def test_no_ledger_takes_everything_and_knows_nothing(ledger: Ledger) -> None:
    public = {name for name in vars(Ledger) if not name.startswith("_")}
    assert {name for name in vars(NoLedger) if not name.startswith("_")} == public
    none = NoLedger()
    events(see(REF), DEAL, TRAINED, ("rewind", (0,)), FREED, LOST, ("close", ()))(none)  # type: ignore[arg-type]
    assert (none.find([A]), none.available(), none.covered(9), list(none.deals())) == ({}, [], [], [])


# -- what must be refused ----------------------------------------------------------------------------------------------


def test_another_runs_ledger_is_refused(ledger: Ledger, path: Path) -> None:
    ledger.close()
    with pytest.raises(ConfigError, match=r"belongs to run 'run', not to 'other'.*run\.directory"):
        Ledger(path, run_id="other")


def _is_text(path: Path) -> None:
    path.write_text("refs go here\n" * 100)


def _is_another_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE run (run_id TEXT)")


def _is_of_a_later_format(path: Path) -> None:
    Ledger(path, run_id="run").close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 3")


def _is_cut_short(path: Path) -> None:
    with closing(Ledger(path, run_id="run")) as ledger:
        ledger.see([make_ref(number) for number in range(300)])
    path.write_bytes(path.read_bytes()[:20_000])


def _holds_a_spoiled_page(path: Path) -> None:
    with closing(Ledger(path, run_id="run")) as ledger:
        ledger.see([make_ref(number) for number in range(300)])
    content = bytearray(path.read_bytes())
    content[-4096:] = b"\xa5" * 4096
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_is_text, "damaged.*move ledger.sqlite"),
        (_is_another_database, "no ledger of format 2"),
        (_is_of_a_later_format, "no ledger of format 2"),
        (_is_cut_short, "damaged.*move ledger.sqlite"),
        (_holds_a_spoiled_page, "damaged.*move ledger.sqlite"),
    ],
)
def test_what_is_no_whole_ledger_is_refused_and_left_alone(
    spoil: Callable[[Path], None], message: str, path: Path
) -> None:
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message) as refused:
        Ledger(path, run_id="run")
    assert refused.value.where == str(path)
    assert path.read_bytes() == before


def test_an_empty_file_becomes_a_ledger(path: Path) -> None:
    path.touch()
    with closing(Ledger(path, run_id="run")) as ledger:
        ledger.see([REF])


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be written.*unable to open"):
        Ledger(tmp_path / "absent" / "ledger.sqlite", run_id="run")


def test_a_ledger_that_cannot_be_opened_now_is_not_called_damaged(path: Path) -> None:
    Ledger(path, run_id="run").close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(DataError, match=r"cannot be written"):
            Ledger(path, run_id="run")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_process_holding_it_is_waited_for_only_so_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "_LOCK_SECONDS", 0.05)
    with closing(Ledger(path, run_id="run")) as ledger, closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataError, match="another process has locked"):
            ledger.see([REF])
        other.rollback()
        ledger.see([REF])


# -- full disks and kills ----------------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file may grow beyond ``limit`` bytes, as on a disk with so much room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("count", "room"), [(1, 0), (1, 5000), (5000, 50_000)])
def test_a_full_disk_is_refused_and_the_ledger_goes_on_once_there_is_room(
    count: int, room: int, ledger: Ledger, path: Path
) -> None:
    ledger.see([REF])
    ledger.deal(0, [A])
    many = [make_ref(number) for number in range(1, 1 + count)]
    with (
        file_size_limit(path.with_name("ledger.sqlite-wal").stat().st_size + room),
        pytest.raises(DataError, match=r"ledger\.sqlite: the ledger cannot be written.*free space"),
    ):
        ledger.see(many)
    assert (ledger.available(), ledger.find([A])[A].window) == ([], 0)
    ledger.see(many)
    assert len(ledger.available()) == len(many)


WRITES_UNTIL_KILLED = """
import sys
from pathlib import Path
from specforge_core.contracts import SampleRef
from specforge_core.features.ledger import Ledger

def ref(number):
    return SampleRef(f"prompt-{number}.e0", 1, "any", (), 5, f"prompt-{number}", 0)

ledger = Ledger(Path(sys.argv[1]), run_id="run")
for window in range(int(sys.argv[2]), 10**9):
    refs = [ref(window * 8 + n) for n in range(8)]
    ids = [ref.sample_id for ref in refs]
    ledger.see(refs)
    ledger.deal(window, ids)
    print("dealt", window, flush=True)
    ledger.trained(window)
    print("trained", window, flush=True)
    ledger.freed(ids)
"""


def test_a_writer_killed_at_any_moment_leaves_what_it_had_committed(path: Path) -> None:
    first = 0
    for lines in (1, 2, 9, 24):
        said = _kill_after(path, first, lines)
        with closing(Ledger(path, run_id="run")) as ledger:
            deals = list(ledger.deals())
            windows = sorted({window for window, *_ in deals})
            assert windows == list(range(len(windows)))
            for window in windows:
                held = [(sample, trained) for w, sample, _, trained in deals if w == window]
                assert [sample for sample, _ in held] == [make_ref(window * 8 + n).sample_id for n in range(8)]
                assert len({trained for _, trained in held}) == 1
            trained = {window for window, _, _, is_trained in deals if is_trained}
            assert {window for what, window in said if what == "dealt"} <= set(windows)
            assert {window for what, window in said if what == "trained"} <= trained
            assert set(windows) - trained <= {windows[-1]}
            first = len(trained)
            ledger.rewind(first)
            unfreed = [ref.sample_id for ref in ledger.covered(first)]
            assert len(unfreed) in (0, 8)
            ledger.freed(unfreed)


def _kill_after(path: Path, first: int, lines: int) -> list[tuple[str, int]]:
    """Kill a writer with SIGKILL once it has said so many lines; returns all that it said."""
    command = [sys.executable, "-c", WRITES_UNTIL_KILLED, str(path), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(lines)]
            time.sleep(0.0007 * lines)
        finally:
            writer.kill()
        said += writer.stdout.read().splitlines()
    return [(line.split()[0], int(line.split()[1])) for line in said if len(line.split()) == 2]
