# SPDX-License-Identifier: Apache-2.0
"""Where the run's shared secret comes from, and what is no secret."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from specforge_core.config.run_config import RunSection
from specforge_core.contracts import ConfigError
from specforge_core.run.token import VARIABLE, read_token

SECRET = "0123456789abcdef0123456789abcdef"


def section(tmp_path: Path, content: str | bytes | None = None) -> RunSection:
    if content is None:
        return RunSection(directory=tmp_path)
    path = tmp_path / "token"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o600)
    return RunSection(directory=tmp_path, token_file=path)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_there_is_none_unless_it_is_configured(tmp_path: Path) -> None:
    assert read_token(section(tmp_path)) is None


def test_it_comes_from_a_file_without_the_line_end(tmp_path: Path) -> None:
    assert read_token(section(tmp_path, f"{SECRET}\n")) == SECRET


def test_it_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" {SECRET}\n")
    assert read_token(section(tmp_path)) == SECRET


def test_the_file_that_the_run_file_names_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "another secret altogether")
    assert read_token(section(tmp_path, SECRET)) == SECRET


@pytest.mark.parametrize("token", ["", "\n", "short", "fifteen letters"])
def test_a_token_too_short_to_be_a_secret_is_refused(
    tmp_path: Path, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="16 are the least") as from_file:
        read_token(section(tmp_path, token))
    assert from_file.value.where == str(tmp_path / "token")
    monkeypatch.setenv(VARIABLE, token)
    with pytest.raises(ConfigError, match="16 are the least") as from_environment:
        read_token(section(tmp_path))
    assert VARIABLE in from_environment.value.where
    assert "openssl rand" in from_environment.value.hint


@pytest.mark.parametrize("token", ["short", "fifteen letters"])
def test_no_message_tells_the_token(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_token(section(tmp_path, token))
    assert token not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = RunSection(directory=tmp_path, token_file=tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"run\.token_file cannot be read") as caught:
        read_token(missing)
    assert caught.value.where == str(tmp_path / "gone")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(RunSection(directory=tmp_path, token_file=tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(section(tmp_path, b"\xff\xfe not text, whatever it is"))


@pytest.mark.parametrize("mode", [0o666, 0o644, 0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    named = section(tmp_path, SECRET)
    (tmp_path / "token").chmod(mode)
    with pytest.raises(ConfigError, match=r"others may read or write the token file \(mode") as caught:
        read_token(named)
    assert "chmod 600" in caught.value.hint
    assert SECRET not in str(caught.value)
    (tmp_path / "link").symlink_to(tmp_path / "token")
    with pytest.raises(ConfigError, match="others may"):
        read_token(RunSection(directory=tmp_path, token_file=tmp_path / "link"))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_of_the_owners_alone_is_read_through_a_link_too(tmp_path: Path, mode: int) -> None:
    section(tmp_path, SECRET)
    (tmp_path / "token").chmod(mode)
    (tmp_path / "link").symlink_to("token")
    assert read_token(RunSection(directory=tmp_path, token_file=tmp_path / "link")) == SECRET


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    named = section(tmp_path, SECRET)
    os.chown(tmp_path / "token", 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_token(named)


@pytest.mark.parametrize(
    "content",
    [
        f"{SECRET}\x00",
        f"{SECRET}\n{SECRET}",
        f"\ufeff{SECRET}",
        SECRET.encode("utf-16"),
        f"{SECRET}\x1b[2J",
        SECRET.encode() + b"\xe9",
        SECRET * 3000,
    ],
)
def test_what_is_no_printable_text_is_refused_and_not_shown(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        read_token(section(tmp_path, content))
    assert SECRET not in str(caught.value)
    assert "xe9" not in str(caught.value)


def test_a_device_is_not_read_to_its_end_and_a_pipe_without_a_writer_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="16 are the least"):
        read_token(RunSection(directory=tmp_path, token_file=tmp_path / "pipe"))
    with pytest.raises(ConfigError):
        read_token(RunSection(directory=tmp_path, token_file=Path("/dev/zero")))


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def write() -> None:
        os.write(writing, SECRET[:5].encode())
        os.write(writing, SECRET[5:].encode())
        os.close(writing)

    threading.Timer(0.1, write).start()
    assert read_token(RunSection(directory=tmp_path, token_file=Path(f"/dev/fd/{reading}"))) == SECRET
    os.close(reading)
