# SPDX-License-Identifier: Apache-2.0
"""The lease book as tables: what is asked of it, and what it then says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from specforge_core.contracts import CaptureBatch, ChannelError, Lease, PartContext, RefChannel
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.lease_book import LeaseBook
from specforge_core.features.memory_channel import MemoryChannel
from specforge_core.hooks.builtin import FileChannelConfig, MemoryChannelConfig


def batch(number: int) -> CaptureBatch:
    return CaptureBatch(split="train", epoch=0, first=number, count=1)


def play(steps: str) -> tuple[LeaseBook, list[str]]:
    """Plays steps such as ``o1 ta fa``: offer batch 1, a takes, a finishes its first lease; says who got what.

    ``f``/``g``: finish or give back the oldest lease that the holder ever took and was not played yet; ``d``: drop.
    """
    book, got = LeaseBook(), []
    leases: dict[str, list[Lease]] = {}
    for step, who in steps.split():
        if step == "o":
            book.offer(batch(int(who)))
        elif step == "d":
            book.drop(who)
        elif step == "e":
            book.end(who)
        elif step == "t":
            lease = book.take(who)
            got.append(f"{who}{lease.batch.first}.{lease.attempt}" if lease else f"{who}-")
            leases.setdefault(who, []).extend([lease] if lease else [])
        else:
            {"f": book.finish, "g": book.give_back}[step](leases[who].pop(0))
    return book, got


@pytest.mark.parametrize(
    ("steps", "got", "outstanding"),
    [
        ("ta", ["a-"], []),
        ("o1 o2 ta tb tc", ["a1.1", "b2.1", "c-"], [1, 2]),
        ("o1 ta fa ta", ["a1.1", "a-"], []),
        ("o1 ta fa o1 ta", ["a1.1", "a1.1"], [1]),
        ("o1 o1 ta ta", ["a1.1", "a-"], [1]),
        ("o1 ta o1 tb", ["a1.1", "b-"], [1]),
        ("o1 o2 ta ga tb", ["a1.1", "b1.1"], [1, 2]),
        ("o1 o2 o3 ta ta ga ga tb tb tb", ["a1.1", "a2.1", "b1.1", "b2.1", "b3.1"], [1, 2, 3]),
        ("o1 o2 ta da tb tb", ["a1.1", "b1.2", "b2.1"], [1, 2]),
        ("o1 ta da tb db tc", ["a1.1", "b1.2", "c1.3"], [1]),
        ("o1 ta da tb gb tc", ["a1.1", "b1.2", "c1.2"], [1]),
        ("o1 ta da tb fa tc", ["a1.1", "b1.2", "c-"], [1]),
        ("o1 ta da tb ga tc", ["a1.1", "b1.2", "c-"], [1]),
        ("o1 ta da ta fa tb", ["a1.1", "a1.2", "b-"], [1]),
        ("o1 o2 ta ex tb", ["a1.1", "b-"], []),
        ("o1 ta ex fa", ["a1.1"], []),
        ("o1 ta ex o1 tb fb", ["a1.1", "b1.1"], []),
        ("o1 ta ex o1 tb fa", ["a1.1", "b1.1"], [1]),
        ("dx", [], []),
    ],
)
def test_who_gets_what(steps: str, got: Sequence[str], outstanding: Sequence[int]) -> None:
    book, found = play(steps)
    assert found == got
    assert [batch.first for batch in book.outstanding()] == outstanding


@pytest.mark.parametrize(
    ("steps", "ended"), [("o1", None), ("o1 ex", "x"), ("ex", "x"), ("ex o1", None), ("ex ey", "y")]
)
def test_an_end_holds_until_the_next_offer(steps: str, ended: str | None) -> None:
    assert play(steps)[0].ended == ended


@pytest.mark.parametrize(("steps", "holders"), [("o1 o2 ta ta", "a"), ("o1 o2 ta tb fa", "b"), ("o1 ta da", "")])
def test_holders_are_those_who_hold(steps: str, holders: str) -> None:
    assert "".join(play(steps)[0].holders) == holders


def test_any_play_keeps_one_holder_and_forgets_nothing() -> None:
    choice = random.Random(5)
    book, offered, finished = LeaseBook(), set[str](), set[str]()
    held: dict[str, Lease] = {}
    for number in range(5000):
        match choice.choice("ottfgd"):
            case "o":
                offered.add(batch(number).key)
                book.offer(batch(number))
            case "t" if (lease := book.take(choice.choice("abc"))) is not None:
                assert lease.batch.key not in held
                held[lease.batch.key] = lease
            case ("f" | "g") as step if held:
                lease = held.pop(choice.choice(sorted(held)))
                (book.finish if step == "f" else book.give_back)(lease)
                finished |= {lease.batch.key} if step == "f" else set()
            case "d":
                gone = choice.choice("abc")
                book.drop(gone)
                held = {key: lease for key, lease in held.items() if lease.holder != gone}
        assert sorted(book.holders) == sorted({lease.holder for lease in held.values()})
    assert {batch.key for batch in book.outstanding()} == offered - finished


def channels(directory: Path) -> list[RefChannel]:
    context = PartContext(run_id="run", directory=directory)
    return [
        MemoryChannel(MemoryChannelConfig(name="memory"), context),
        FileChannel(FileChannelConfig(name="file"), context),
    ]


def test_only_an_open_writer_can_take(tmp_path: Path) -> None:
    for channel in channels(tmp_path):
        desk = channel.leases()
        desk.offer([batch(1)])
        for holder in ("nobody", "closed"):
            channel.writer("closed").close()
            with pytest.raises(ChannelError, match="only an open writer"):
                desk.take(holder, 5.0)
        assert desk.outstanding() == [batch(1)]
        desk.close()
