# SPDX-License-Identifier: Apache-2.0
"""Who is taken for dead, from what is seen of a file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from specforge_core.features.file_lock import lock_domain
from specforge_core.features.liveness import Heartbeat, Liveness, OwnerWatch, _beating_devices
from specforge_core.features.record_file import OwnerView, RecordAppender, RecordTail, frame


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([(True, 1, 0), (True, 1, 1000)], [False, False]),
        ([(True, 1, 0), (False, 1, 1)], [False, True]),
        ([(False, 1, 0), (False, 1, 9), (False, 1, 11)], [False, False, True]),
        ([(False, 1, 0), (False, 2, 9), (False, 2, 18), (False, 2, 20)], [False, False, False, True]),
        ([(False, 1, 0), (True, 1, 50), (True, 1, 500)], [False, False, False]),
    ],
)
def test_liveness(seen: list[tuple[bool, int, float]], expected: list[bool]) -> None:
    liveness = Liveness(timeout_seconds=10)
    assert [liveness.is_dead(locked=a, locks_seen=False, heartbeat_ns=b, now=c) for a, b, c in seen] == expected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # heartbeat, now; twelve looks in as many seconds
        ([(1, n) for n in range(13)], True),
        ([(1 + n // 4, n) for n in range(13)], False),
        # it goes on after all
        ([*((1, n) for n in range(13)), (2, 13)], False),
        # the watcher itself stood still for an hour, and looks at once when it goes on
        ([(1, 0), (1, 1), (1, 3600), (1, 3601)], False),
        # it looks seldom, and nothing moves from look to look
        ([(1, 60 * n) for n in range(6)], True),
    ],
)
def test_who_keeps_its_lock_and_stands_still_is_stalled_but_not_dead(
    seen: list[tuple[int, float]], expected: bool
) -> None:
    liveness = Liveness(timeout_seconds=10)
    for beat, now in seen:
        assert not liveness.is_dead(locked=True, locks_seen=True, heartbeat_ns=beat, now=now)
    assert liveness.is_stalled is expected


def test_nobody_is_stalled_on_a_file_system_where_no_heartbeat_moves(tmp_path: Path) -> None:
    silent, beating = RecordAppender(tmp_path / "silent"), RecordAppender(tmp_path / "beating")
    watch = OwnerWatch(RecordTail(tmp_path / "silent").owner, timeout_seconds=0.02)

    def stalled() -> bool:
        for _ in range(8):
            assert not watch.is_dead(domain="")
            time.sleep(0.01)
        return watch.is_stalled()

    _beating_devices.clear()
    assert not stalled()
    heartbeat = Heartbeat(beating, timeout_seconds=0.02)
    time.sleep(0.1)
    assert stalled()
    heartbeat.stop()
    silent.close()
    beating.close()


def test_where_locks_are_seen_a_free_one_says_enough() -> None:
    assert Liveness(timeout_seconds=10).is_dead(locked=False, locks_seen=True, heartbeat_ns=1, now=0)
    assert not Liveness(timeout_seconds=10).is_dead(locked=True, locks_seen=True, heartbeat_ns=1, now=0)


def test_locks_are_seen_on_one_kernel_and_file_system(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, (tmp_path / "file").open("rb") as again:
        domain = lock_domain(file)
        assert domain
        assert OwnerView(again).sees_locks_of(domain)
        assert not OwnerView(again).sees_locks_of("another kernel:1")
        assert not OwnerView(again).sees_locks_of("")


def test_the_last_kind_is_that_of_the_last_complete_record(tmp_path: Path) -> None:
    path = tmp_path / "records"
    appender = RecordAppender(path)
    owner = RecordTail(path).owner
    assert owner.last_kind() == ""
    for kind, body in (("V", "first"), ("F", "long " * 5000), ("C", None)):
        appender.append([frame(kind, body)], durable=False)
        assert owner.last_kind() == kind
    with path.open("ab") as file:
        file.write(frame("R", "x" * 9000)[:-1])
    assert owner.last_kind() == "C"
    appender.close()
