# SPDX-License-Identifier: Apache-2.0
"""The queue book as tables: what is asked of it, and what it then says."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from specforge_core.channel.queue_book import QueueBook
from specforge_core.contracts import CaptureBatch
from specforge_core.contracts.capture_queue import Ending, NumberedLease


def batch(number: int, count: int = 1) -> CaptureBatch:
    return CaptureBatch(split="train", epoch=0, first=number, count=count)


def stopped(session: int) -> Ending:
    return Ending(kind="stopped", session=session)


def play(steps: str) -> tuple[QueueBook[str], list[str]]:
    """Plays steps such as ``o1 ta fa``: offer batch 1, a takes, a finishes its first lease; what was said to each.

    ``t``: ``a1.2#7``, worker a got batch 1, its second attempt, lease 7. ``f``: the position, or ``lost``.
    ``f``/``g``/``s``: finish, give back or split the oldest lease that the worker took and did not play yet; ``d``:
    drop; ``c``: commit up to a position; ``e``: end a session; ``n``: number the next lease above.
    """
    book, said = QueueBook[str](), list[str]()
    leases: dict[str, list[NumberedLease]] = {}
    for step, *rest in steps.split():
        who = "".join(rest)
        match step:
            case "o":
                book.offer([batch(int(who))])
            case "n":
                book.offer([], above=int(who))
            case "d":
                book.drop(who)
            case "c":
                book.commit(int(who))
            case "e":
                said.append("ended" if book.end(stopped(int(who))) else "not ended")
            case "t":
                lease = book.take(who)
                said.append(f"{who}{lease.batch.first}.{lease.attempt}#{lease.number}" if lease else f"{who}-")
                leases.setdefault(who, []).extend([lease] if lease else [])
            case "f":
                result = book.finish(leases[who].pop(0), who)
                said.append(str(result.position) if result else "lost")
            case "g":
                book.give_back(leases[who].pop(0))
            case "s":
                lease = leases[who].pop(0)
                book.give_back(lease, instead=[batch(10 * lease.batch.first + part) for part in (0, 1)])
    return book, said


@pytest.mark.parametrize(
    ("steps", "said", "outstanding"),
    [
        ("ta", ["a-"], []),
        ("o1 o2 ta tb tc", ["a1.1#1", "b2.1#2", "c-"], [1, 2]),
        ("o1 o1 ta ta", ["a1.1#1", "a-"], [1]),
        ("o1 o2 ta ga tb", ["a1.1#1", "b1.1#2"], [1, 2]),
        ("o1 o2 o3 ta ta ga ga tb tb tb", ["a1.1#1", "a2.1#2", "b1.1#3", "b2.1#4", "b3.1#5"], [1, 2, 3]),
        ("o1 o2 ta da tb tb", ["a1.1#1", "b1.2#2", "b2.1#3"], [1, 2]),
        ("o1 ta da tb db tc gc td", ["a1.1#1", "b1.2#2", "c1.3#3", "d1.3#4"], [1]),
        ("dx", [], []),
        # finishing is publishing, once, by whoever has the last lease
        ("o1 ta fa", ["a1.1#1", "1"], []),
        ("o1 o2 ta tb fb fa", ["a1.1#1", "b2.1#2", "1", "2"], []),
        ("o1 ta da tb fa fb", ["a1.1#1", "b1.2#2", "lost", "1"], []),
        ("o1 ta da tb fb fa", ["a1.1#1", "b1.2#2", "1", "lost"], []),
        ("o1 ta da fa", ["a1.1#1", "lost"], [1]),
        ("o1 ta da ta fa fa", ["a1.1#1", "a1.2#2", "lost", "1"], []),
        ("o1 ta da tb ga fb", ["a1.1#1", "b1.2#2", "1"], []),
        # what is finished is offered again once it is committed
        ("o1 ta fa o1 tb", ["a1.1#1", "1", "b-"], []),
        ("o1 ta fa c1 o1 tb fb", ["a1.1#1", "1", "b1.1#2", "2"], []),
        # parts of a batch take its place
        ("o1 o2 ta sa tb tb tb", ["a1.1#1", "b2.1#2", "b10.1#3", "b11.1#4"], [2, 10, 11]),
        ("o1 ta da tb sa fb", ["a1.1#1", "b1.2#2", "1"], []),
        # numbers grow over sessions, and above what another queue gave
        ("n40 o1 ta", ["a1.1#41"], [1]),
        ("n40 o1 ta n3 da tb", ["a1.1#41", "b1.2#42"], [1]),
        ("o1 ta e1 o1 tb fa fb", ["a1.1#1", "ended", "b1.1#2", "lost", "1"], []),
        # an end is of one session, and said once
        ("e0 e0 o1", ["ended", "not ended"], [1]),
        ("o1 e1 e1 o2 e1", ["ended", "not ended", "not ended"], [2]),
        ("o1 o2 ta e1 fa tb", ["a1.1#1", "ended", "lost", "b-"], []),
    ],
)
def test_who_gets_what(steps: str, said: Sequence[str], outstanding: Sequence[int]) -> None:
    book, found = play(steps)
    assert found == said
    assert [batch.first for batch in book.outstanding()] == outstanding


@pytest.mark.parametrize(
    ("steps", "after", "positions"),
    [
        ("o1 o2 ta tb fb fa", 0, [1, 2]),
        ("o1 o2 ta tb fb fa", 1, [2]),
        ("o1 o2 ta tb fb fa", 9, []),
        ("o1 o2 ta tb fb fa c1", 0, [2]),
        ("o1 o2 ta tb fb fa c1", 1, [2]),
        ("o1 o2 ta tb fb fa c9", 0, []),
        ("o1 ta fa e1 o2 tb fb", 0, [1, 2]),  # results outlive the session
    ],
)
def test_results_stay_until_they_are_committed(steps: str, after: int, positions: Sequence[int]) -> None:
    assert [result.position for result in play(steps)[0].results(after)] == positions


def test_held_leases_are_found_by_their_number() -> None:
    book, _ = play("o1 o2 ta tb")
    assert [lease.worker for number in (1, 2, 3) for lease in [book.held(number)] if lease] == ["a", "b"]


def test_any_play_finishes_each_offer_once_and_forgets_nothing() -> None:
    choice, book = random.Random(5), QueueBook[int]()
    offered, taken, positions = set[str](), list[NumberedLease](), list[int]()
    for number in range(8000):
        match choice.choice("oottfgd"):
            case "o":
                offered.add(batch(number).key)
                book.offer([batch(number)])
            case "t":
                lease = book.take(choice.choice("abc"))
                taken += [lease] if lease else []
            case ("f" | "g") as step if taken:
                lease, held = choice.choice(taken[-20:]), False
                held = book.holds(lease)
                if step == "g":
                    book.give_back(lease)
                    continue
                result = book.finish(lease, number)
                assert (result is not None) == held
                positions += [result.position] if result else []
            case "d":
                book.drop(choice.choice("abc"))
    numbers = [lease.number for lease in taken]
    assert numbers == sorted(set(numbers))
    assert positions == list(range(1, len(positions) + 1))
    finished = {result.lease.batch.key for result in book.results(0)}
    assert len(finished) == len(positions)
    assert finished.isdisjoint(batch.key for batch in book.outstanding())
    assert finished | {batch.key for batch in book.outstanding()} == offered
