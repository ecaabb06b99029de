# SPDX-License-Identifier: Apache-2.0
"""Where the run's shared secret comes from, and what is no secret."""

from __future__ import annotations

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
