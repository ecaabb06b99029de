# SPDX-License-Identifier: Apache-2.0
"""The file channel under torn records, killed processes, a full disk and files that are not its own."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from specforge_core.contracts import ChannelError, InFlight, PartContext, PeerDied, RefWriter, SampleRef
from specforge_core.features.channel_tails import VERSION_FRAME
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.record_file import RecordTail, frame
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.ref_channel_suite import read_all
from specforge_core.testing.samples import make_ref


def open_channel(directory: Path, *, writer_timeout_seconds: float = 60.0) -> FileChannel:
    config = FileChannelConfig(name="file", path=directory, writer_timeout_seconds=writer_timeout_seconds)
    return FileChannel(config, PartContext(run_id="run", directory=directory))


BATCH = 2


def published(directory: Path, count: int = 6) -> list[SampleRef]:
    """What a writer published, in batches, before it closed."""
    refs = [make_ref(number) for number in range(count)]
    writer = open_channel(directory).writer("capture-0")
    for first in range(0, count, BATCH):
        writer.publish(refs[first : first + BATCH])
    writer.close()
    return refs


WRITER = """
import sys, time
from pathlib import Path
from specforge_core.contracts import PartContext
from specforge_core.features.channel_tails import VERSION_FRAME
from specforge_core.features.file_channel import FileChannel
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.samples import make_ref
directory, name, first, count, end = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
channel = FileChannel(FileChannelConfig(name="file", path=directory), PartContext(run_id="run", directory=directory))
writer = channel.writer(name)
print("open", flush=True)
for number in range(first, first + count, 5):
    writer.publish([make_ref(number + offset) for offset in range(5)])
print("published", flush=True)
if end == "wait":
    sys.stdin.readline()
writer.close()
"""


def start_writer(directory: Path, name: str, first: int, count: int, end: str = "close") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(directory), name, str(first), str(count), end]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    while (said := process.stdout.readline()) and said.strip() != line:
        pass
    assert said.strip() == line


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        process.communicate(timeout=60)


def test_a_record_torn_at_any_byte_is_never_parsed(tmp_path: Path) -> None:
    refs = published(tmp_path / "whole")
    content = (tmp_path / "whole" / "capture-0.refs").read_bytes()
    directory = tmp_path / "torn"
    directory.mkdir()
    path = directory / "capture-0.refs"
    path.touch()
    reader = open_channel(directory, writer_timeout_seconds=600).reader()
    got: list[SampleRef] = []
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # its writer lives
        for position in range(len(content)):
            file.write(content[position : position + 1])
            got += reader.poll(10, 0.0)
            whole_lines = content[: position + 1].split(b"\n")[:-1]
            assert got == refs[: BATCH * sum(line[:1] == b"R" for line in whole_lines)]
    assert got == refs
    assert reader.drained
    reader.close()


def test_reopening_cuts_a_torn_record_at_any_byte_and_goes_on(tmp_path: Path) -> None:
    refs = published(tmp_path / "whole", count=3)
    content = (tmp_path / "whole" / "capture-0.refs").read_bytes()
    for length in range(0, len(content), 3):
        directory = tmp_path / f"torn-{length}"
        directory.mkdir()
        (directory / "capture-0.refs").write_bytes(content[:length])
        writer = open_channel(directory).writer("capture-0")
        before = list(writer.published())
        assert before == refs[: len(before)]
        writer.publish([make_ref(50)])
        writer.close()
        reader = open_channel(directory).reader()
        assert read_all(reader, len(before) + 1) == [*before, make_ref(50)]
        assert reader.drained
        reader.close()


def test_every_changed_byte_is_an_error_that_names_file_and_offset(tmp_path: Path) -> None:
    published(tmp_path, count=2)
    path = tmp_path / "capture-0.refs"
    content = path.read_bytes()
    for position in range(len(content)):
        if content[position : position + 1] == b"\n":
            continue
        path.write_bytes(content[:position] + b"~" + content[position + 1 :])
        with pytest.raises(ChannelError, match=r"capture-0\.refs, offset \d+"):
            open_channel(tmp_path).reader().poll(10, 0.0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (frame("V", ["specforge refs", 1]), "version"),
        (frame("V", ["specforge refs", 2]), "version"),
        (frame("V", ["something else", 2]), "format"),
        (frame("R", [0, ["p"], 0, 1, 3]), "format"),
        (b"\n", "checksum"),
        (b"not a record\n", "checksum"),
    ],
)
def test_files_of_another_version_are_refused(tmp_path: Path, line: bytes, why: str) -> None:
    (tmp_path / "capture-0.refs").write_bytes(line)
    with pytest.raises(ChannelError, match=why):
        open_channel(tmp_path).reader().poll(1, 0.0)
    with pytest.raises(ChannelError, match=why):
        open_channel(tmp_path).writer("capture-0")


@pytest.mark.parametrize(
    "line",
    [
        frame("R", [7, ["p"], 0, 1, 3]),
        frame("R", [0, ["p"], 0, 1]),
        frame("R", [0, ["p"], 0, -1, 3]),
        frame("R", [0, [5], 0, 1, 3]),
        frame("R", [0, "p", 0, 1, 3]),
        frame("R", {"sample_id": "p"}),
        frame("L", ["store", [["x", "complex64", None, [None]]]]),
        frame("L", ["store", [["x", "float32", "mid", [None]]]]),
        frame("L", 3),
        frame("Z", None),
    ],
)
def test_malformed_records_are_refused(tmp_path: Path, line: bytes) -> None:
    published(tmp_path)
    with (tmp_path / "capture-0.refs").open("ab") as file:
        file.write(line)
    reader = open_channel(tmp_path).reader()
    for _ in range(2):
        with pytest.raises(ChannelError, match="offset"):
            read_all(reader, 7)
    reader.close()


def test_two_processes_write_while_one_reads(tmp_path: Path) -> None:
    reader = open_channel(tmp_path).reader()
    processes = [start_writer(tmp_path, f"capture-{index}", 1000 * index, 100) for index in range(2)]
    refs = []
    deadline = time.monotonic() + 60
    while not reader.drained or len(refs) < 200:
        assert time.monotonic() < deadline
        refs += reader.poll(7, 0.2)
    finish(*processes)
    for index in range(2):
        mine = [ref for ref in refs if int(ref.prompt_id[7:]) // 1000 == index]
        assert mine == [make_ref(1000 * index + number) for number in range(100)]
    reader.close()


def test_a_killed_writer_is_noticed_after_what_it_published(tmp_path: Path) -> None:
    reader = open_channel(tmp_path).reader()
    process = start_writer(tmp_path, "capture-0", 0, 20, end="wait")
    wait_for(process, "published")
    assert reader.poll(1, 10) == [make_ref(0)]
    assert not reader.drained
    process.kill()
    finish(process)
    assert read_all(reader, 19) == [make_ref(number) for number in range(1, 20)]
    begun = time.monotonic()
    with pytest.raises(PeerDied, match="capture-0 died"):
        reader.poll(1, 30)
    assert time.monotonic() - begun < 10
    reader.close()


def test_a_writer_killed_in_mid_append_goes_on_where_it_was(tmp_path: Path) -> None:
    process = start_writer(tmp_path, "capture-0", 0, 1_000_000)
    wait_for(process, "open")
    time.sleep(0.2)
    process.kill()
    finish(process)
    writer = open_channel(tmp_path).writer("capture-0")
    done = len(writer.published())
    assert done > 0
    writer.publish([make_ref(number) for number in range(done, done + 3)])
    writer.close()
    reader = open_channel(tmp_path).reader()
    assert read_all(reader, done + 3) == [make_ref(number) for number in range(done + 3)]
    assert reader.drained
    reader.close()


def test_a_writer_that_died_before_the_reader_came_is_noticed_in_time(tmp_path: Path) -> None:
    process = start_writer(tmp_path, "capture-0", 0, 5, end="wait")
    wait_for(process, "published")
    process.kill()
    finish(process)
    reader = open_channel(tmp_path, writer_timeout_seconds=0.3).reader()
    assert len(read_all(reader, 5)) == 5
    with pytest.raises(PeerDied, match="capture-0 died"):
        reader.poll(1, 30)
    reader.close()


def test_a_file_whose_writer_never_began_holds_up_nobody_for_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process was killed, or its disk full, before it said who it is; nobody has the file locked."""
    refs = published(tmp_path)
    (tmp_path / "gone.refs").touch()
    (tmp_path / "torn\x1b[31m.refs").write_bytes(b"V 0000")
    begun = time.monotonic()
    open_channel(tmp_path, writer_timeout_seconds=60).seal()
    assert time.monotonic() - begun < 10
    assert "waiting" in caplog.text
    assert "'gone'" in caplog.text
    assert "\x1b" not in caplog.text
    reader = open_channel(tmp_path).reader()
    assert read_all(reader, len(refs)) == refs
    assert reader.drained
    reader.close()


def test_a_writer_of_another_machine_is_waited_for_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        opened = frame("O", ["elsewhere", 1, "another kernel:1"])
        (tmp_path / f"far-{number}.refs").write_bytes(VERSION_FRAME + opened)
    open_channel(tmp_path, writer_timeout_seconds=0.3).seal()
    assert "writer 'far-0', 'far-1', 'far-2' and 2 more" in caplog.text
    assert all((tmp_path / f"far-{number}.refs").read_bytes().endswith(frame("C", None)) for number in range(5))


def test_nobody_is_waited_for_where_all_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    published(tmp_path)
    open_channel(tmp_path).writer("living").publish([make_ref(0)])
    process = start_writer(tmp_path, "killed", 0, 5, end="wait")
    wait_for(process, "published")
    process.kill()
    finish(process)
    begun = time.monotonic()
    open_channel(tmp_path).seal()
    assert time.monotonic() - begun < 2
    assert caplog.text == ""


def test_a_killed_reader_is_noticed_by_the_writer(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from specforge_core.contracts import PartContext\n"
        "from specforge_core.features.file_channel import FileChannel\n"
        "from specforge_core.hooks.builtin import FileChannelConfig\n"
        "path = Path(sys.argv[1]); config = FileChannelConfig(name='file', path=path)\n"
        "reader = FileChannel(config, PartContext(run_id='r', directory=path)).reader()\n"
        "print('open', flush=True); time.sleep(60)"
    )
    writer = open_channel(tmp_path).writer("capture-0")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    wait_for(process, "open")
    writer.publish([make_ref(0)])
    process.kill()
    finish(process)
    with pytest.raises(PeerDied, match="reading process died"):
        writer.in_flight()
    writer.publish([make_ref(1)])
    assert list(writer.published()) == [make_ref(0), make_ref(1)]
    successor = open_channel(tmp_path).reader()
    assert writer.in_flight().refs == 2
    assert read_all(successor, 2) == [make_ref(0), make_ref(1)]
    successor.close()
    writer.close()


def test_a_former_readers_failure_does_not_stop_the_next_session(tmp_path: Path) -> None:
    former = open_channel(tmp_path)
    reader, writer = former.reader(), former.writer("capture-0")
    writer.publish([make_ref(0), make_ref(1)])
    assert len(read_all(reader, 2)) == 2
    reader.ack([make_ref(0).sample_id], step=1)
    reader.fail("out of memory")
    reader.close()
    writer.fail("the reader failed")
    again = open_channel(tmp_path).writer("capture-0")
    assert again.in_flight().refs == 1
    again.publish([make_ref(2)])
    again.close()
    later = open_channel(tmp_path).reader()
    assert read_all(later, 2) == [make_ref(1), make_ref(2)]
    later.close()


def test_opening_a_sealed_channel_to_write_does_not_unseal_it(tmp_path: Path) -> None:
    refs = published(tmp_path)
    content = (tmp_path / "capture-0.refs").read_bytes()
    writer = open_channel(tmp_path).writer("capture-0")
    reader = open_channel(tmp_path).reader()
    assert list(writer.published()) == refs
    assert read_all(reader, len(refs)) == refs
    assert reader.drained
    writer.close()
    assert (tmp_path / "capture-0.refs").read_bytes() == content
    reader.close()


def test_one_name_has_one_living_writer(tmp_path: Path) -> None:
    process = start_writer(tmp_path, "capture-0", 0, 5, end="wait")
    wait_for(process, "published")
    with pytest.raises(ChannelError, match="somebody else is writing"):
        open_channel(tmp_path).writer("capture-0")
    process.kill()
    finish(process)


def test_a_writer_that_is_dropped_lets_go_of_its_name(tmp_path: Path) -> None:
    writer = open_channel(tmp_path, writer_timeout_seconds=0.02).writer("capture-0")
    writer.publish([make_ref(0)])
    time.sleep(0.05)
    del writer
    gc.collect()
    again = open_channel(tmp_path).writer("capture-0")
    assert list(again.published()) == [make_ref(0)]
    again.close()


def test_a_silent_writer_whose_lock_cannot_be_seen_lives_by_its_heartbeat(tmp_path: Path) -> None:
    writer = open_channel(tmp_path, writer_timeout_seconds=0.2).writer("capture-0")
    path = tmp_path / "capture-0.refs"
    before = path.stat().st_mtime_ns
    time.sleep(0.3)
    assert path.stat().st_mtime_ns > before
    writer.close()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 300])
def test_names_that_could_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ChannelError, match="cannot name a file"):
        open_channel(tmp_path).writer(name)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("a small file system can be mounted only by root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_keeps_what_was_published(tiny_disk: Path) -> None:
    writer = open_channel(tiny_disk).writer("capture-0")
    (tiny_disk / "filler").write_bytes(b"x" * 30_000)
    with pytest.raises(ChannelError, match="No space left"):
        publish_many(writer, batches=100)
    whole = list(writer.published())
    assert whole == [make_ref(number) for number in range(len(whole))]
    assert len(whole) % 100 == 0
    (tiny_disk / "filler").unlink()
    writer.publish([make_ref(len(whole))])
    assert list(writer.published()) == [*whole, make_ref(len(whole))]
    writer.close()


def publish_many(writer: RefWriter, *, batches: int) -> None:
    for batch in range(batches):
        writer.publish([make_ref(100 * batch + number) for number in range(100)])


def test_a_ref_takes_few_bytes(tmp_path: Path) -> None:
    published(tmp_path, count=1000)
    assert (tmp_path / "capture-0.refs").stat().st_size / 1000 < 60


def test_a_batch_of_any_size_is_published_whole_in_records_of_bounded_size(tmp_path: Path) -> None:
    refs = [make_ref(0, epoch=epoch) for epoch in range(10_000)]
    writer = open_channel(tmp_path).writer("capture-0")
    writer.publish(refs)
    reader = open_channel(tmp_path).reader()
    assert read_all(reader, len(refs)) == refs
    assert max(map(len, (tmp_path / "capture-0.refs").read_bytes().split(b"\n"))) < 200_000
    reader.ack([ref.sample_id for ref in refs[1:]], step=1)
    assert writer.in_flight() == InFlight(1, refs[0].nbytes)
    assert list(writer.published()) == refs[:1]
    reader.close()
    writer.close()


def test_a_batch_with_one_bad_ref_is_not_published_at_all(tmp_path: Path) -> None:
    writer = open_channel(tmp_path).writer("capture-0")
    size = (tmp_path / "capture-0.refs").stat().st_size
    with pytest.raises(ChannelError, match="counts"):
        writer.publish([make_ref(0), make_ref(1, generation=-1)])
    assert (tmp_path / "capture-0.refs").stat().st_size == size
    writer.publish([make_ref(2)])
    assert list(writer.published()) == [make_ref(2)]
    writer.close()


def test_reading_goes_on_from_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"")
    tail = RecordTail(path)
    with path.open("ab", buffering=0) as file:
        for number in range(5):
            file.write(frame("R", number))
            assert [record.body() for record in tail.read()] == [number]
    assert tail.read() == []
    tail.close()
