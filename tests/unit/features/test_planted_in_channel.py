# SPDX-License-Identifier: Apache-2.0
"""A channel's directory that others can write into: what they plant leads nowhere, hostile records are errors, lines
have ends, and who ended keeps nothing open."""

from __future__ import annotations

import json
import os
import resource
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from specforge_core.contracts import CaptureBatch, ChannelError, PartContext, RefReader
from specforge_core.features.channel_tails import VERSION_FRAME as VERSION
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.record_file import frame
from specforge_core.hooks.builtin import FileChannelConfig
from specforge_core.testing.samples import make_ref

MINE = b"this belongs to somebody, and lies outside of the channel\n"
BATCH = CaptureBatch(split="train", epoch=0, first=0, count=4)
Attempt = Callable[[FileChannel], object]


def open_channel(directory: Path) -> FileChannel:
    config = FileChannelConfig(name="file", path=directory)
    return FileChannel(config, PartContext(run_id="run", directory=directory))


def line(kind: bytes, text: bytes) -> bytes:
    """A record whose checksum is right, whatever its text is."""
    return b"%s %08x %s\n" % (kind, zlib.crc32(text, kind[0]), text)


def poll(channel: FileChannel) -> object:
    reader = channel.reader()
    try:
        return reader.poll(100, 0.0)
    finally:
        reader.close()


def write(channel: FileChannel) -> None:
    writer = channel.writer("mine")
    try:
        writer.publish([make_ref(5)])
        writer.in_flight()
        writer.published()
    finally:
        writer.close()


def lease(channel: FileChannel) -> None:
    writer, desk = channel.writer("holder"), channel.leases()
    try:
        desk.offer([BATCH])
        taken = desk.take("holder", 0.0)
        if taken is not None:
            desk.finish(taken)
        desk.outstanding()
        desk.end("the test is over")
    finally:
        writer.close()
        desk.close()


ATTEMPTS: list[Attempt] = [poll, write, lease, FileChannel.seal]


def errors_of(directory: Path) -> list[str]:
    """Of everything that a run does with a channel."""
    errors = []
    for attempt in ATTEMPTS:
        try:
            attempt(open_channel(directory))
        except ChannelError as error:
            errors.append(str(error))
    return errors


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("mine", "a.refs"):
        (outside / name).write_bytes(MINE)
        os.utime(outside / name, (0, 0))
    yield outside
    for name in ("mine", "a.refs"):
        assert (outside / name).read_bytes() == MINE
        assert (outside / name).stat().st_mtime == 0


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "mine")


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "not there")


def hard_link(path: Path, outside: Path) -> None:
    os.link(outside / "mine", path)


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [link, link_to_nothing, hard_link, pipe, folder], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("name", ["mine.refs", "holder.refs", "other.refs", "00ff.acks", "leases.log"])
def test_what_is_planted_leads_nowhere(
    tmp_path: Path, outside: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    directory = tmp_path / "refs"
    directory.mkdir()
    plant(directory / name, outside)
    errors = errors_of(directory)
    assert any(str(directory / name) in error for error in errors), errors
    assert not (outside / "not there").exists()


def test_a_batch_that_a_stranger_leased_names_no_file_elsewhere(tmp_path: Path) -> None:
    for holder in ("../outside/a", "/etc/passwd", "a\0b", "", 7, None, ["a"]):
        directory = tmp_path / str(abs(hash(str(holder))))
        open_channel(directory).leases().offer([BATCH])
        with (directory / "leases.log").open("ab") as file:
            file.write(frame("T", [holder, "domain"]))
        with pytest.raises(ChannelError, match=r"leases\.log, offset"):
            lease(open_channel(directory))


def test_the_directory_that_nobody_chose_is_no_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "refs").symlink_to(outside)
    channel = FileChannel(FileChannelConfig(name="file"), PartContext(run_id="run", directory=tmp_path / "run"))
    for attempt in ATTEMPTS:
        with pytest.raises(ChannelError, match="symbolic link"):
            attempt(channel)
    assert sorted(path.name for path in outside.iterdir()) == ["a.refs", "mine"]


def test_the_configured_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "chosen").symlink_to(tmp_path / "disk")
    assert errors_of(tmp_path / "chosen") == []
    assert (tmp_path / "disk" / "mine.refs").exists()


def test_a_directory_that_everybody_writes_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert errors_of(tmp_path / "open") == errors_of(tmp_path / "own") == []
    (told,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "open") in told


def test_nothing_is_made_that_everybody_may_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert errors_of(tmp_path / "refs") == []
    finally:
        os.umask(before)
    for path in (tmp_path / "refs", *(tmp_path / "refs").iterdir()):
        assert not path.stat().st_mode & 0o002, path


DEEP = b"[" * 10_000 + b"]" * 10_000
LAYOUT = frame("L", ["store", [["x", "float32", None, [None]]]])
RECORDS = [
    line(b"R", DEEP),
    line(b"L", DEEP),
    line(b"O", DEEP),
    line(b"F", DEEP),
    line(b"V", DEEP),
    line(b"C", DEEP),
    line(b"R", b'{"a":' * 10_000),
    line(b"R", b"1" * 10_000),
    line(b"R", b"[0,[" + b'"p",' * 5),
    line(b"R", b"\xff\xfe"),
    line(b"R", b"1 2"),
    line(b"R", b""),
    line(b"\xff", b"1"),
    line(b"R", b"NaN"),
    line(b"L", b'["s",[["x",["float32"],null,[1]]]]'),
    line(b"L", b'["s",[["x","float32",{},[1]]]]'),
    LAYOUT + frame("R", [0, ["p"], 0, 1, 2**63]),
    LAYOUT + frame("R", [0, ["p", "q"], 0, 1, [3]]),
    LAYOUT + frame("R", [0, ["p", ["q"]], 0, 1, 3]),
    LAYOUT + frame("R", [0, ["p"], 0, 1e30, 3]),
    LAYOUT + frame("R", [{}, ["p"], 0, 1, 3]),
    LAYOUT + frame("R", [10**30, ["p"], 0, 1, 3]),
]


@pytest.mark.parametrize("content", RECORDS, ids=range(len(RECORDS)))
def test_a_hostile_record_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    writer = open_channel(tmp_path).writer("honest")
    writer.publish([make_ref(1)])
    writer.close()
    with (tmp_path / "honest.refs").open("ab") as file:
        file.write(content)
    with pytest.raises(ChannelError, match=r"honest\.refs, offset \d+"):
        poll(open_channel(tmp_path))
    with pytest.raises(ChannelError, match=r"honest\.refs, offset \d+"):
        write(open_channel(tmp_path))


def test_a_state_that_says_odd_things_is_shown_in_short(tmp_path: Path) -> None:
    reader = open_channel(tmp_path).reader()
    (tmp_path / "a.refs").write_bytes(VERSION + frame("O", {"host": 7}) + frame("F", ["x" * 100_000]))
    with pytest.raises(ChannelError) as raised:
        reader.poll(1, 0.0)
    assert len(str(raised.value)) < 5000
    reader.close()


ACKS = [
    *(frame("A", body) for body in (None, 7, "text", {}, [], [1], [1, [5]], [1, 5], [1, {}], [1, "ab"], [[], []])),
    *(frame("A", [1, [ack]]) for ack in (None, "ab", {}, [], ["p"], ["p", "1"], [1, 1], ["p", 1.0], ["p", True])),
    frame("A", ["1", [["p", 1]]]),
    line(b"A", DEEP),
    frame("R", [0, ["p"], 0, 1, 3]),
]


@pytest.mark.parametrize("content", ACKS, ids=range(len(ACKS)))
def test_a_hostile_ack_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    writer = open_channel(tmp_path).writer("mine")
    writer.publish([make_ref(1)])
    (tmp_path / "00ff.acks").write_bytes(VERSION + content)
    for attempt in (writer.in_flight, writer.published, open_channel(tmp_path).reader):
        with pytest.raises(ChannelError, match=r"00ff\.acks, offset \d+"):
            attempt()
    writer.close()


def offered(**changes: object) -> bytes:
    fields = {"split": "train", "epoch": 0, "first": 0, "count": 4, "wanted": [], "fingerprint": "", **changes}
    return frame("B", list(fields.values()))


LEASES = [
    *(offered(split=value) for value in (None, 7, [], {}, "test")),
    *(offered(**{key: value}) for key in ("epoch", "first") for value in (None, "1", -1, 1.0, 1e30, 10**18, True, [])),
    *(offered(count=value) for value in (None, "1", -1, 4.0, 10**18, 2**31, True, [4])),
    *(offered(wanted=value) for value in (None, 7, "12", {}, [4], [-1], [0.0], [None], [[0]], [1, 1], [10**18])),
    *(offered(fingerprint=value) for value in (None, 7, [])),
    *(frame("B", body) for body in (None, {}, "123456", ["train", 0, 0, 4, []], 7)),
    *(frame("T", body) for body in (None, 7, "ab", {}, ["a"], ["a", 7], [["a"], "d"], {"a": 1, "b": 2})),
    *(frame(kind, body) for kind in "FGDE" for body in (None, 7, [], {}, ["a"])),
    frame("F", "train.0.0+4"),
    *(line(kind, DEEP) for kind in (b"B", b"T", b"F", b"E", b"D")),
]


@pytest.mark.parametrize("content", LEASES, ids=range(len(LEASES)))
def test_a_hostile_lease_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    open_channel(tmp_path).leases().offer([])
    (tmp_path / "leases.log").write_bytes(frame("V", ["specforge leases", 1]) + content)
    for _ in range(2):
        with pytest.raises(ChannelError, match=r"leases\.log, offset \d+"):
            lease(open_channel(tmp_path))


@pytest.mark.parametrize("nbytes", [64 << 20, 10 << 30], ids=["64 MiB", "10 GiB"])
@pytest.mark.parametrize("name", ["other.refs", "mine.refs", "00ff.acks", "leases.log"])
def test_a_line_without_end_is_an_error_and_takes_neither_time_nor_memory(
    tmp_path: Path, nbytes: int, name: str
) -> None:
    honest = open_channel(tmp_path).writer("honest")
    honest.publish([make_ref(number) for number in range(10)])
    with (tmp_path / name).open("wb") as file:
        file.truncate(nbytes)
    tracemalloc.start()
    begun = time.monotonic()
    try:
        errors = errors_of(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        honest.close()
    assert any(name in error and "without an end" in error for error in errors), errors
    assert time.monotonic() - begun < 5
    assert peak < 64 << 20


def test_a_line_that_is_not_ended_yet_is_not_read_again_and_again(tmp_path: Path) -> None:
    honest = open_channel(tmp_path).writer("honest")
    with (tmp_path / "other.refs").open("wb") as file:
        file.truncate(4 << 20)
    reader = open_channel(tmp_path).reader()
    assert reader.poll(1, 0.0) == []
    begun = time.process_time()
    for number in range(300):
        honest.publish([make_ref(number)])
        assert reader.poll(1, 0.0) == [make_ref(number)]
    assert time.process_time() - begun < 1
    honest.close()
    reader.close()


def test_the_largest_batches_fit(tmp_path: Path) -> None:
    """4096 refs to a record, whose ids are as long as file names may be."""
    refs = [make_ref(number) for number in range(8192)]
    refs = [type(ref)(**{**as_dict(ref), "prompt_id": "\U00020000" * 48 + f"{ref.prompt_id[7:]:>5}"}) for ref in refs]
    writer, reader = open_channel(tmp_path).writer("mine"), open_channel(tmp_path).reader()
    writer.publish(refs)
    got = read(reader, len(refs))
    assert got == refs
    reader.ack([ref.sample_id for ref in got], step=1)
    assert writer.in_flight().refs == 0
    writer.close()
    reader.close()


def as_dict(ref: object) -> dict[str, object]:
    return {name: getattr(ref, name) for name in type(ref).__dataclass_fields__}  # type: ignore[attr-defined]


def read(reader: RefReader, count: int) -> list[object]:
    refs: list[object] = []
    while len(refs) < count:
        refs += reader.poll(count, 10.0)
    return refs


def test_a_record_that_nobody_would_read_is_not_written(tmp_path: Path) -> None:
    writer = open_channel(tmp_path).writer("mine")
    huge = type(make_ref(1))(**{**as_dict(make_ref(1)), "prompt_id": "x" * (9 << 20)})
    with pytest.raises(ChannelError, match="shorter"):
        writer.publish([huge])
    writer.publish([make_ref(2)])
    assert list(writer.published()) == [make_ref(2)]
    writer.close()


@pytest.fixture
def few_files() -> Iterator[int]:
    """No more than a few dozen files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = max(map(int, os.listdir("/proc/self/fd"))) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (now, hard))
    yield now
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("end", [frame("C", None), frame("F", "it broke"), b"", b"R 0000 torn"])
@pytest.mark.parametrize("domain", ["", "another machine"], ids=["here", "elsewhere"])
def test_who_ended_keeps_no_file_open(tmp_path: Path, few_files: int, end: bytes, domain: str) -> None:
    first = open_channel(tmp_path).writer("first")
    first.publish([make_ref(0)])
    content = (tmp_path / "first.refs").read_bytes()
    if domain:
        own = next(row for row in content.splitlines(keepends=True) if row[:1] == b"O")
        host, pid, _ = json.loads(own[11:])
        content = content.replace(own, frame("O", [host, pid, domain]))
    for number in range(150):
        (tmp_path / f"ended-{number}.refs").write_bytes(content + end)
        (tmp_path / f"{number:04}.acks").write_bytes(VERSION + frame("O", ["host", 1, domain]) + end)
    reader, desk = open_channel(tmp_path).reader(), open_channel(tmp_path).leases()
    assert len(read(reader, 151)) == 151
    late = [open_channel(tmp_path).writer("late"), open_channel(tmp_path).writer("later")]
    for number, writer in enumerate(late):
        writer.publish([make_ref(number + 1)])
        assert writer.in_flight().refs >= 1
        assert len(writer.published()) >= 1
    assert len(read(reader, 2)) == 2
    desk.offer([BATCH])
    assert desk.take("late", 1.0) is not None
    # A name that ended and goes on is followed again.
    again = open_channel(tmp_path).writer("ended-7")
    again.publish([make_ref(9)])
    assert read(reader, 1) == [make_ref(9)]
    assert late[0].in_flight().refs == 4
    for writer in (*late, again, first):
        writer.close()
    reader.close()
    desk.close()
    if end[:1] == b"C":
        open_channel(tmp_path).seal()
