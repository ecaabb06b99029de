# SPDX-License-Identifier: Apache-2.0
"""Leases of a shared directory under killed and stopped processes, torn logs and a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from specforge_core.contracts import CaptureBatch, ChannelError, Lease, LeaseDesk, PartContext, PeerDied
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.record_file import Record, RecordTail, frame
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.ref_channel_suite import read_all
from specforge_core.testing.samples import make_ref

DEADLINE_SECONDS = 60.0

HOLDER = """
import os, sys, time
from pathlib import Path
from specforge_core.contracts import PartContext
from specforge_core.features.file_channel import FileChannel
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.samples import make_ref
directory, name, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = FileChannelConfig(name="file", path=directory, writer_timeout_seconds=0.5)
channel = FileChannel(config, PartContext(run_id="run", directory=directory))
writer, desk = channel.writer(name), channel.leases()
def publish(batch, offsets):
    writer.publish([make_ref(batch.first + offset) for offset in offsets])
if what in ("half", "whole"):
    lease = desk.take(name, 30)
    publish(lease.batch, range(2))
    if what == "half":
        whole = (directory / (name + ".refs")).read_bytes().splitlines(keepends=True)[-1]
        os.write(writer._file._file.fileno(), whole[:-5])
    print("half", flush=True)
    sys.stdin.readline()
    publish(lease.batch, range(2, 4))
    desk.finish(lease)
else:
    print("begun", flush=True)
    while desk.ended is None and (lease := desk.take(name, 30)) is not None:
        time.sleep(0.002)
        publish(lease.batch, lease.batch.offsets)
        desk.finish(lease)
print("done", flush=True)
writer.close()
"""


def open_channel(directory: Path) -> FileChannel:
    config = FileChannelConfig(name="file", path=directory, writer_timeout_seconds=0.5)
    return FileChannel(config, PartContext(run_id="run", directory=directory))


def batch(number: int) -> CaptureBatch:
    return CaptureBatch(split="train", epoch=0, first=4 * number, count=4)


Start = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts holders: ``start(name, what)``; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), name, what]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE_SECONDS)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == line


def take(desk: LeaseDesk, holder: str) -> Lease:
    lease = desk.take(holder, DEADLINE_SECONDS)
    assert lease is not None
    return lease


def test_what_a_killed_holder_published_stays_and_its_lease_comes_back(tmp_path: Path, start: Start) -> None:
    channel = open_channel(tmp_path)
    desk, reader = channel.leases(), channel.reader()
    desk.offer([batch(0), batch(1)])
    doomed = start("doomed", "half")
    wait_for(doomed, "half")
    doomed.kill()
    doomed.wait(DEADLINE_SECONDS)
    assert read_all(reader, 2) == [make_ref(0), make_ref(1)]
    with pytest.raises(PeerDied, match="doomed"):
        reader.poll(1, DEADLINE_SECONDS)
    writer = channel.writer("heir")
    lease = take(desk, "heir")
    assert (lease.batch, lease.attempt) == (batch(0), 2)
    writer.publish([make_ref(number) for number in range(4)])
    desk.finish(lease)
    assert desk.outstanding() == [batch(1)]
    assert read_all(reader, 4) == [make_ref(number) for number in range(4)]
    writer.close()
    channel.seal()
    assert reader.poll(1, DEADLINE_SECONDS) == []
    assert reader.drained
    reader.close()
    desk.close()


def test_a_new_session_knows_at_once_that_the_holder_is_dead(tmp_path: Path, start: Start) -> None:
    open_channel(tmp_path).leases().offer([batch(0)])
    doomed = start("doomed", "half")
    wait_for(doomed, "half")
    doomed.kill()
    doomed.wait(DEADLINE_SECONDS)
    config = FileChannelConfig(name="file", path=tmp_path, writer_timeout_seconds=3600.0)
    channel = FileChannel(config, PartContext(run_id="run", directory=tmp_path))
    writer = channel.writer("heir")
    assert take(channel.leases(), "heir").attempt == 2
    writer.close()
    channel.seal()
    reader = channel.reader()
    assert read_all(reader, 2) == [make_ref(0), make_ref(1)]
    assert reader.poll(1, 5.0) == []
    assert reader.drained
    reader.close()


def test_a_stopped_holder_is_passed_over_and_does_no_harm_when_it_goes_on(tmp_path: Path, start: Start) -> None:
    channel = open_channel(tmp_path)
    desk, writer, reader = channel.leases(), channel.writer("other"), channel.reader()
    desk.offer([batch(0), batch(1)])
    stopped = start("stopped", "whole")
    wait_for(stopped, "half")
    stopped.send_signal(signal.SIGSTOP)
    lease = take(desk, "other")
    assert lease.batch == batch(1)
    desk.finish(lease)
    begun = time.monotonic()
    lease = take(desk, "other")  # its lock is held all the while
    assert (lease.batch, lease.attempt) == (batch(0), 2)
    assert 0.4 < time.monotonic() - begun < 10
    writer.publish([make_ref(number, generation=2) for number in range(4)])
    assert stopped.stdin is not None
    stopped.stdin.write("go on\n")
    stopped.stdin.flush()
    stopped.send_signal(signal.SIGCONT)
    wait_for(stopped, "done")  # it published the rest, and finished a lease that was not its own any more
    assert desk.outstanding() == [batch(0)]
    desk.finish(lease)
    assert desk.outstanding() == []
    stopped.wait(DEADLINE_SECONDS)
    writer.close()
    refs = read_all(reader, 8)
    assert len(set(refs)) == 8
    assert reader.drained
    reader.close()
    desk.close()


def test_a_machine_that_stood_still_takes_nobody_for_stalled(tmp_path: Path, start: Start) -> None:
    """Holder and taker are stopped together for four times as long as a silent writer has, and go on together."""
    channel = open_channel(tmp_path)
    desk, reader = channel.leases(), channel.reader()
    desk.offer([batch(0)])
    holder = start("holder", "whole")
    wait_for(holder, "half")
    taker = start("taker", "all")
    wait_for(taker, "begun")
    time.sleep(0.3)
    for process in (holder, taker):
        process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    for process in (taker, holder):
        process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert {record.kind for record in log_records(tmp_path)} == {"V", "B", "T"}
    desk.end("the test is over")
    reader.close()


def log_records(directory: Path) -> list[Record]:
    tail = RecordTail(directory / "leases.log")
    log = []
    while records := tail.read():
        log += records
    tail.close()
    return log


def test_holders_that_are_killed_again_and_again_lose_nothing(tmp_path: Path, start: Start) -> None:
    channel = open_channel(tmp_path)
    desk, reader = channel.leases(), channel.reader()
    offered = [batch(number) for number in range(150)]
    desk.offer(offered)
    holders = [start(f"holder-{number}", "all") for number in range(2)]
    for number in range(2, 6):
        wait_for(holders[-1], "begun")
        time.sleep(0.03)
        holders[-1].kill()
        holders.append(start(f"holder-{number}", "all"))
    refs = []
    deadline = time.monotonic() + DEADLINE_SECONDS
    while desk.outstanding():
        assert time.monotonic() < deadline
        refs += reader.poll(100, 0.05)
    desk.end("everything was captured")
    for holder in (holders[0], holders[-1]):
        assert holder.wait(DEADLINE_SECONDS) == 0
    channel.seal()
    while not reader.drained:
        assert time.monotonic() < deadline
        refs += reader.poll(100, 0.1)
    assert {ref.prompt_id for ref in refs} == {f"prompt-{number}" for number in range(600)}
    finished = Counter(record.body() for record in log_records(tmp_path) if record.kind == "F")
    assert finished == Counter(offer.key for offer in offered)
    reader.close()


def test_a_log_torn_at_any_byte_goes_on_from_its_last_whole_record(tmp_path: Path) -> None:
    channel = open_channel(tmp_path / "whole")
    writer, desk = channel.writer("a"), channel.leases()
    desk.offer([batch(0), batch(1)])
    desk.give_back(take(desk, "a"))
    desk.finish(take(desk, "a"))
    writer.close()
    content = (tmp_path / "whole" / "leases.log").read_bytes()
    for length in range(len(content)):
        directory = tmp_path / f"torn-{length}"
        directory.mkdir()
        (directory / "leases.log").write_bytes(content[:length])
        witness, desk = open_channel(directory).leases(), open_channel(directory).leases()
        left = witness.outstanding()
        assert left in ([], [batch(0)], [batch(0), batch(1)], [batch(1)])
        desk.offer([batch(7)])
        assert witness.outstanding() == desk.outstanding() == [*left, batch(7)]
        assert open_channel(directory).leases().outstanding() == [*left, batch(7)]
        witness.close()
        desk.close()


@pytest.mark.parametrize(
    "line",
    [
        frame("V", ["specforge leases", 2]),
        frame("Z", None),
        frame("B", ["train", 0]),
        frame("F", "train.0.99+4"),
        frame("T", "a"),
        b"not a record\n",
    ],
)
def test_a_log_that_cannot_be_understood_is_refused_again_and_again(tmp_path: Path, line: bytes) -> None:
    desk = open_channel(tmp_path).leases()
    desk.offer([batch(0)])
    path = tmp_path / "leases.log"
    with path.open("ab") as file:
        file.write(line)
    size = path.stat().st_size
    for _ in range(2):
        with pytest.raises(ChannelError, match=r"leases\.log, offset \d+"):
            desk.offer([batch(1)])
    with pytest.raises(ChannelError, match=r"leases\.log, offset \d+"):
        open_channel(tmp_path).leases().outstanding()
    assert path.stat().st_size == size


def test_another_versions_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "leases.log").write_bytes(frame("V", ["specforge leases", 2]))
    with pytest.raises(ChannelError, match="this version reads"):
        open_channel(tmp_path).leases().offer([batch(0)])


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small file system can be mounted only by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_an_offer_that_finds_no_room_is_not_made(tiny_disk: Path) -> None:
    desk, witness = open_channel(tiny_disk).leases(), open_channel(tiny_disk).leases()
    desk.offer([batch(0)])
    (tiny_disk / "filler").write_bytes(b"x" * 50_000)
    with pytest.raises(ChannelError, match="No space left"):
        desk.offer([batch(number) for number in range(1, 2000)])
    assert desk.outstanding() == witness.outstanding() == [batch(0)]
    (tiny_disk / "filler").unlink()
    desk.offer([batch(1)])
    assert desk.outstanding() == witness.outstanding() == [batch(0), batch(1)]
    desk.close()
    witness.close()


def test_a_sealed_channel_is_read_from_a_directory_that_cannot_be_written(tiny_disk: Path) -> None:
    writer = open_channel(tiny_disk).writer("capture-0")
    writer.publish([make_ref(number) for number in range(3)])
    writer.close()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    for _ in range(2):
        reader = open_channel(tiny_disk).reader()
        assert read_all(reader, 3) == [make_ref(number) for number in range(3)]
        assert reader.drained
        reader.ack([make_ref(0).sample_id], step=1)
        reader.close()
    open_channel(tiny_disk).seal()
