# SPDX-License-Identifier: Apache-2.0
"""The run's shared secret: from a file that the run file names, or from the environment.

The file is anything that can be opened (a link, as orchestrators mount secrets; a pipe), but like a key of ssh's it is
refused where others than its owner may read or write it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from specforge_core.config.run_config import RunSection
from specforge_core.contracts import ConfigError

VARIABLE = "SPECFORGE_TOKEN"
_FEWEST_CHARACTERS = 16
"""Sixteen random letters and digits are some 95 bits."""
_MOST_BYTES = 1 << 16  # a device or a wrong file is not read to its end
_MAKE_ONE = "make one: openssl rand -hex 32 > FILE; chmod 600 FILE"


def read_token(section: RunSection) -> str | None:
    """The token, or None where none is configured. No message tells any of it.

    :raises ConfigError: a file that cannot be read or is open to others, or a token that cannot be a secret.
    """
    if section.token_file is not None:
        where = str(section.token_file)
        content, status = _read_file(section.token_file)
        token = _check(_decode(content, where), where)
        _refuse_open_to_others(status, section.token_file)
        return token
    if VARIABLE in os.environ:
        return _check(os.environ[VARIABLE].strip(), f"environment, {VARIABLE}")
    return None


def _check(token: str, where: str) -> str:
    if len(token) < _FEWEST_CHARACTERS:
        raise ConfigError(
            f"the token has {len(token)} characters, {_FEWEST_CHARACTERS} are the least",
            where=where,
            hint="make one: openssl rand -hex 32",
        )
    if not token.isprintable():
        raise ConfigError(
            "the token holds something other than printable text", where=where, hint="make one: openssl rand -hex 32"
        )
    return token


def _read_file(path: Path) -> tuple[bytes, os.stat_result]:
    try:
        # Not blocking: a pipe that nobody writes to reads as empty.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            os.set_blocking(file.fileno(), True)
            content = b""
            while len(content) <= _MOST_BYTES and (part := file.read(_MOST_BYTES)):
                content += part
            status = os.fstat(file.fileno())
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run.token_file cannot be read: {reason}", where=str(path), hint=_MAKE_ONE) from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"holds more than {_MOST_BYTES} bytes, so no token", where=str(path), hint=_MAKE_ONE)
    return content, status


def _refuse_open_to_others(status: os.stat_result, path: Path) -> None:
    """:raises ConfigError: somebody besides its owner, who is this user or root, may read or write it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            "the token file belongs to another user",
            where=str(path),
            hint=f"copy it, then chmod 600 the copy, if {path} holds what you expect",
        )
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"others may read or write the token file (mode {stat.S_IMODE(status.st_mode):o})",
            where=str(path),
            hint=f"chmod 600 {path}, and make another token if somebody may have read this one; "
            f"where a mount sets the mode, hand the token over in {VARIABLE}",
        )


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ConfigError("run.token_file cannot be read: it is not UTF-8 text", where=where, hint=_MAKE_ONE) from None
