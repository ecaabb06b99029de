# SPDX-License-Identifier: Apache-2.0
"""A file queue whose workers are killed: every batch is finished once, and several readers see the same."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import queue_worker
from specforge_core.channel.file_queue import FileQueue
from specforge_core.contracts import ChannelError
from specforge_core.contracts.capture_queue import Ending
from specforge_core.testing.queue_under_test import make_batch, make_refs

BATCHES, WORKERS, KILLS = 120, 4, 12
DEADLINE_SECONDS = 120.0


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, queue_worker.__file__, str(directory), *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)


@contextmanager
def opened(directory: Path) -> Iterator[FileQueue]:
    queue = FileQueue(directory, timeout_seconds=queue_worker.TIMEOUT_SECONDS)
    yield queue
    queue.close()


@pytest.mark.timeout(240)
def test_workers_are_killed_and_every_batch_is_finished_once(tmp_path: Path) -> None:
    choice, kills, started = random.Random(11), 0, 0
    workers: list[subprocess.Popen[str]] = []
    with opened(tmp_path) as queue:
        queue.offer([make_batch(number) for number in range(BATCHES)])
        deadline = time.monotonic() + DEADLINE_SECONDS
        while queue.outstanding():
            assert time.monotonic() < deadline
            while len(workers) < WORKERS:
                started += 1
                workers.append(start(tmp_path, "work", f"w{started}"))
            done = len(queue.results(0, 0.0).results)
            if kills < KILLS and done > kills * BATCHES // KILLS // 2:
                workers.pop(choice.randrange(WORKERS)).kill()
                kills += 1
            time.sleep(0.05)
        assert queue.end(Ending(kind="finished", session=1))
        for worker in workers:
            assert worker.wait(DEADLINE_SECONDS) == 0
    assert kills == KILLS
    readers = [start(tmp_path, "read") for _ in range(3)]
    seen = [json.loads(reader.communicate(timeout=DEADLINE_SECONDS)[0]) for reader in readers]
    assert seen[0] == seen[1] == seen[2], "reading forgets nothing, and all see the same"
    positions, firsts, numbers, samples = zip(*seen[0], strict=True)
    assert list(positions) == list(range(1, BATCHES + 1))
    assert sorted(firsts) == [4 * number for number in range(BATCHES)]
    assert len(set(numbers)) == BATCHES
    assert all(len(ids) == 4 for ids in samples)


def finish_one(queue: FileQueue) -> None:
    with_member = queue.join("w")
    queue.offer([make_batch(0), make_batch(1)])
    lease = queue.take("w", 1.0)
    assert lease is not None
    assert queue.finish(lease, make_refs(lease))
    with_member.close()


def test_a_member_that_was_taken_for_dead_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path) as queue, opened(tmp_path) as others:
        slow, quick = queue.join("slow"), others.join("quick")
        queue.offer([make_batch(0), make_batch(1)])
        lost = queue.take("slow", 1.0)
        assert lost is not None
        with others._call():
            others._append("D", "slow")
        held = others.take("quick", 1.0)
        assert held is not None
        assert held.batch == lost.batch
        assert not queue.finish(lost, make_refs(lost))
        again = queue.take("slow", 1.0)
        assert again is not None
        assert queue.finish(again, make_refs(again))
        assert others.finish(held, make_refs(held))
        assert others.results(0, 0.0).members == {"slow", "quick"}
        slow.close()
        quick.close()


class InterruptedQueue(FileQueue):
    """Somebody else finishes the last batch and ends the session while this one is being told what there is."""

    def __init__(self, directory: Path, others: FileQueue) -> None:
        super().__init__(directory, timeout_seconds=queue_worker.TIMEOUT_SECONDS)
        self._others = others

    def _when(self, look, timeout):
        found = super()._when(look, timeout)
        lease = self._others.take("w", 0.0)
        if lease is not None:
            assert self._others.finish(lease, make_refs(lease))
            assert self._others.end(Ending(kind="finished", session=1))
        return found


def test_an_ending_is_not_seen_before_the_results_that_came_before_it(tmp_path: Path) -> None:
    with opened(tmp_path) as others:
        others.offer([make_batch(0)])
        member, queue = others.join("w"), InterruptedQueue(tmp_path, others)
        first = queue.results(0, 0.0)
        assert (list(first.results), first.ending) == ([], None)
        then = queue.results(0, 0.0)
        assert len(then.results) == 1
        assert then.ending is not None
        queue.close()
        member.close()


def test_what_was_not_appended_whole_never_was(tmp_path: Path) -> None:
    with opened(tmp_path) as queue:
        finish_one(queue)
    with (tmp_path / "queue.log").open("ab") as log:
        log.write(b'E 00000000 ["finished",1')
    with opened(tmp_path) as queue:
        assert queue.results(0, 0.0).ending is None
        assert queue.end(Ending(kind="stopped", session=1))
    with opened(tmp_path) as queue:
        assert queue.results(0, 0.0).ending == Ending(kind="stopped", session=1)


@pytest.mark.parametrize(
    ("file", "place", "what"),
    [
        ("queue.log", 60, "checksum"),
        ("queue.log", 3, "checksum"),
        ("w.refs", -3, "checksum"),
    ],
)
def test_what_was_altered_is_an_error_with_its_place(tmp_path: Path, file: str, place: int, what: str) -> None:
    with opened(tmp_path) as queue:
        finish_one(queue)
    content = bytearray((tmp_path / file).read_bytes())
    content[place] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ChannelError, match=what) as raised, opened(tmp_path) as queue:
        queue.results(0, 0.0)
    assert file in str(raised.value)


@pytest.mark.parametrize("name", ["queue.log", "w.refs"])
def test_a_planted_link_is_not_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("keep")
    directory = tmp_path / "queue"
    directory.mkdir()
    os.symlink(outside, directory / name)
    with pytest.raises(ChannelError), opened(directory) as queue:
        queue.join("w")
    assert outside.read_text() == "keep"
