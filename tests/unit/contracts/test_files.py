# SPDX-License-Identifier: Apache-2.0
"""Files that others may have written or planted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from specforge_core.contracts import DataError
from specforge_core.contracts.files import (
    make_directory,
    open_directory,
    open_regular,
    parse_json,
    read_bytes,
    read_json_object,
    replace_file,
)

WRITE = os.O_WRONLY | os.O_CREAT


def test_a_planted_link_is_neither_read_nor_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("belongs to somebody")
    (tmp_path / "link").symlink_to(mine)
    for flags in (os.O_RDONLY, WRITE, os.O_RDWR | os.O_CREAT):
        with pytest.raises(OSError, match="symbolic link"):
            open_regular(tmp_path / "link", flags)
    assert mine.read_text() == "belongs to somebody"


def test_a_second_name_is_read_but_not_written(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("content")
    os.link(tmp_path / "mine", tmp_path / "other")
    assert read_bytes(tmp_path / "other", limit=100) == b"content"
    with pytest.raises(OSError, match="hard link"):
        open_regular(tmp_path / "other", WRITE)


def test_a_pipe_or_directory_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe", os.O_RDONLY)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path, os.O_RDONLY)


def test_a_link_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic link"):
        make_directory(tmp_path / "link")


def test_a_name_in_an_open_directory_cannot_be_led_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"in a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_bytes(b"in b")
    folder = open_directory(tmp_path / "a")
    try:
        (tmp_path / "a").rename(tmp_path / "moved")
        (tmp_path / "a").symlink_to(tmp_path / "b")
        with open(open_regular("file", os.O_RDONLY, dir_fd=folder), "rb") as file:
            assert file.read() == b"in a"
    finally:
        os.close(folder)
    with pytest.raises(OSError, match="symbolic link"):
        open_directory(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        open_directory(tmp_path / "b" / "file")


def test_what_is_made_everybody_may_not_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_directory(tmp_path / "d")
        os.close(open_regular(tmp_path / "d" / "f", WRITE))
    finally:
        os.umask(before)
    assert not (tmp_path / "d").stat().st_mode & 0o002
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o664


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", '{"a": 1} 2', "1" * 10_000], ids=range(5))
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


@pytest.mark.parametrize("content", [b"[1]", b"null", b"[" * 100_000, b"", b"{" + b" " * 200_000 + b"}"], ids=range(5))
def test_what_is_no_object_is_the_callers_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"it is|it cannot"):
        read_json_object(path, refuse=DataError, limit=150_000)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    replace_file(path, b"after")
    assert path.read_text() == "after"
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=r"."):
        replace_file(tmp_path / "directory", b"never")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "file"]


def test_replacing_a_link_replaces_the_link_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    replace_file(tmp_path / "link", b"after")
    assert (tmp_path / "mine").read_text() == "before"
    assert not (tmp_path / "link").is_symlink()
