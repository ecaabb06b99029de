# SPDX-License-Identifier: Apache-2.0
"""Every interleaving of a small run, with every kill: nothing is lost, nothing is trained twice, everything ends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from queue_world import Rules, World

pytestmark = pytest.mark.timeout(240)


@dataclass
class Explored:
    """Every world that can be reached.

    :param problems: what was wrong, each with the steps that lead to it.
    :param stuck: worlds from which no end can be reached without a further accident.
    """

    worlds: int = 0
    problems: list[str] = field(default_factory=list)
    stuck: int = 0


def explore(rules: Rules) -> Explored:
    start = World(rules)
    paths, waiting = {start.key(): ""}, [start]
    before = defaultdict[str, list[str]](list)
    over, found = list[str](), Explored()
    while waiting and not found.problems:
        world = waiting.pop()
        here = world.key()
        found.worlds += 1
        if problem := world.problem():
            found.problems.append(f"{problem}, after{paths[here]}")
            continue
        if world.is_over():
            over.append(here)
        calm = list(world.steps())
        for what, following in [*calm, *world.accidents()]:
            key = following.key()
            if key not in paths:
                paths[key] = f"{paths[here]}\n{what}"
                waiting.append(following)
        for _, following in calm:
            before[following.key()].append(here)
    if not found.problems:
        found.stuck = len(paths) - len(_leading_to(over, before))
    return found


def _leading_to(ends: list[str], before: dict[str, list[str]]) -> set[str]:
    seen, waiting = set(ends), list(ends)
    while waiting:
        for earlier in before[waiting.pop()]:
            if earlier not in seen:
                seen.add(earlier)
                waiting.append(earlier)
    return seen


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(worker_kills=1),
        Rules(trainer_kills=1),
        Rules(false_deaths=1),
        Rules(losses=1),
        Rules(trainer_kills=1, losses=1),
        Rules(trainer_kills=1, false_deaths=1),
    ],
    ids=["undisturbed", "worker", "trainer", "misjudged", "lost", "trainer, lost", "trainer, misjudged"],
)
def test_whatever_happens_everything_is_trained_once_and_ends(rules: Rules) -> None:
    found = explore(rules)
    assert not found.problems, found.problems[0]
    assert found.stuck == 0
    assert found.worlds > 50


@pytest.mark.parametrize(
    "rules",
    [
        Rules(false_deaths=1, store_keeps_highest=False),
        Rules(false_deaths=1, finish_is_fenced=False),
    ],
    ids=["a store that keeps a lower generation", "a lost lease finished"],
)
def test_without_any_one_of_its_promises_something_is_lost(rules: Rules) -> None:
    found = explore(rules)
    assert found.problems or found.stuck
