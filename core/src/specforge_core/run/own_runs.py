# SPDX-License-Identifier: Apache-2.0
"""Which run directories this user made here. Any other one is data that somebody handed over (``config.trust``).

The resolved run file ends with a mark: an HMAC over its text and the directory's path, under a key in the user's state
directory. A directory that was moved, edited or received does not bear it; nor does one where no key can be kept.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from specforge_core.config.document import MAX_BYTES
from specforge_core.config.load import LoadedConfig, RunSource, load_run_config
from specforge_core.contracts import ConfigError
from specforge_core.contracts.files import open_regular, read_bytes
from specforge_core.run.directory import run_file_of

_MARK = b"# made here: "
_KEY_BYTES = 32
"""HMAC-SHA256's own size."""
_ARTEFACTS = ("provenance.json", "ledger.sqlite", "checkpoints/step-*")
"""What a run leaves beside its run file. A folder called checkpoints alone has many a project of a user's own."""


def load_run(run: Path, overrides: Sequence[str]) -> LoadedConfig:
    """The run file behind what a user calls a run, with overrides.

    :raises DataError: a directory that holds no run.
    :raises ConfigError: a run file that is wrong, or a received directory that leads elsewhere.
    """
    path = run_file_of(run)
    if not run.is_dir():
        itself = Path(os.path.realpath(path))  # a link elsewhere that leads into a run directory names it as well
        if not _lies_in_run(itself):
            return load_run_config(path, overrides)
        path = itself
    try:
        content = read_bytes(path, limit=MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    received = not _is_marked(content, path.parent)
    if received:
        _refuse_links(path.parent)
    return load_run_config(path, overrides, source=RunSource(path.parent, content, received))


def mark_as_own(text: str, directory: Path) -> str:
    """The resolved run file of a run that starts here, marked so that ``load_run`` knows it again."""
    key = _read_key() or _make_key()
    return text if key is None else f"{text}{_MARK.decode()}{_digest(key, text.encode(), directory)}\n"


def _lies_in_run(path: Path) -> bool:
    """To name a run directory's own run file is to name the directory."""
    found = (artefact for pattern in _ARTEFACTS for artefact in path.parent.glob(pattern))
    return path.name == "config.yaml" and any(found)


def _is_marked(content: bytes, directory: Path) -> bool:
    text, mark, given = content.rpartition(_MARK)
    key = _read_key() if mark else None
    return key is not None and hmac.compare_digest(_digest(key, text, directory).encode(), given.strip())


def _digest(key: bytes, text: bytes, directory: Path) -> str:
    return hmac.new(key, os.fsencode(os.path.realpath(directory)) + b"\0" + text, hashlib.sha256).hexdigest()


def _refuse_links(directory: Path) -> None:
    """:raises ConfigError: something in it is a link: what is written there would be written elsewhere."""
    for folder, names, files in os.walk(directory):
        for name in (*names, *files):
            path = Path(folder, name)
            if path.is_symlink():
                raise ConfigError(
                    "is a symbolic link, in a run directory that was not made here by you",
                    where=str(path),
                    hint="remove it, or put in its place what it is meant to lead to",
                )


def _key_path() -> Path | None:
    """Where XDG says that a user's state is kept; None: nowhere, as for a user without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "specforge" / "key"
    return None


def _read_key() -> bytes | None:
    """The key, if it is this user's alone."""
    path = _key_path()
    if path is None:
        return None
    with suppress(OSError), open(open_regular(path, os.O_RDONLY), "rb") as file:
        status = os.fstat(file.fileno())
        key = file.read(_KEY_BYTES)
        if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return key if len(key) == _KEY_BYTES else None
    return None


def _make_key() -> bytes | None:
    """A key, made whole or not at all; of several processes at once one makes it."""
    path = _key_path()
    if path is None:
        return None
    temporary = path.with_name(f".key.{secrets.token_hex(6)}")
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(temporary, path)
    with suppress(OSError):
        temporary.unlink()
    return _read_key()
