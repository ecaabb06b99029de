# SPDX-License-Identifier: Apache-2.0
"""Files that somebody else may have written, or planted: opened without following links, read with a limit, parsed
without a traceback, and replaced as a whole.

Every stage reads such files: run directories that were handed over, checkpoints, exports, shared mounts. What is
refused here is refused as an ``OSError`` or a ``ValueError`` whose text says why; each stage names the file and what to
do in an error of its own.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from specforge_core.contracts.errors import SpecForgeError

_log = logging.getLogger(__name__)

MAX_JSON_DEPTH = 100
"""Lists and objects inside each other: no file of ours has ten, and code that walks a value calls itself as deep."""

MAX_JSON_BYTES = 64 << 20
"""The longest JSON document that is read: the index of a checkpoint of a hundred thousand tensors has some 20 MB."""


def open_regular(path: Path | str, flags: int, mode: int = 0o664, *, dir_fd: int | None = None) -> int:
    """``os.open`` of a regular file. A link, pipe, device or directory in its place is refused and not waited for.

    Only the last part of ``path`` is looked at: directories above it are chosen by whoever configured them.

    :param mode: of a file that is made: a group may share it where the umask says so, every user may not write it.
    :param dir_fd: an open directory that ``path`` is a name in (see ``open_directory``).
    :raises OSError: it cannot be opened; it is not a regular file; it is to be written and has a second name (a hard
        link), so that writing would change a file elsewhere.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here", str(path)) from None
        raise
    try:
        _refuse_strange(os.fstat(descriptor), path, writing=flags & os.O_ACCMODE != os.O_RDONLY)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: Path) -> None:
    """For who opens files by name only, as libraries do: look before it does, with the rules of ``open_regular``.

    :raises OSError: there is nothing, or it is not a regular file with one name.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here", str(path))
    _refuse_strange(status, path, writing=True)


def _refuse_strange(status: os.stat_result, path: Path | str, *, writing: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if writing and status.st_nlink > 1:
        raise OSError(errno.EMLINK, "has a second name (a hard link), so it is not written", str(path))


def make_directory(path: Path) -> None:
    """Make ``path`` unless it is there, its parents too.

    :raises OSError: it cannot be made, or a link or a file is in its place.
    """
    path.mkdir(mode=0o775, parents=True, exist_ok=True)
    refuse_link(path)


def refuse_link(path: Path) -> None:
    """:raises OSError: ``path`` is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a symbolic link, which is not followed here", str(path))


def open_directory(path: Path) -> int:
    """A descriptor of a directory: names opened in it (``dir_fd``) cannot be led elsewhere any more.

    :raises OSError: it is not there, or a link or a file is in its place.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        refuse_link(path)  # which the kernel calls no directory
        raise


@functools.cache
def warn_where_anybody_writes(directory: Path, what: str) -> None:
    """Say once per process what follows where every user of the machine may write into a directory.

    :param what: is kept there, in words.
    """
    with suppress(OSError):  # it is not there yet: then it will be made, for its owner and group
        if directory.stat().st_mode & stat.S_IWOTH:
            _log.warning(
                "%s: every user of this machine may write there, and so plant, replace and remove %s; "
                "chmod o-w, or choose a directory of your own",
                directory,
                what,
            )


def read_bytes(path: Path, *, limit: int) -> bytes:
    """The content of a regular file.

    :raises OSError: it cannot be opened (see ``open_regular``), or it is longer than ``limit`` bytes.
    """
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read() if size <= limit else b""  # a read of so many bytes would allocate them first
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"is longer than {limit} bytes", str(path))
    return content


def parse_json(text: bytes | str) -> Any:
    """:raises ValueError: not JSON, not UTF-8, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        nested = [item for item in level if isinstance(item, dict | list)]
        if not nested:
            return value
        level = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    raise ValueError("nested too deeply")


def read_json_object(
    path: Path, *, refuse: Callable[[str], SpecForgeError], limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """The JSON object in a file.

    :param refuse: makes the caller's error from the reason why the file cannot be used.
    :raises SpecForgeError: what ``refuse`` makes: the file is missing, too long, or not a JSON object.
    """
    try:
        value = parse_json(read_bytes(path, limit=limit))
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise refuse(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise refuse("it is not a JSON object")
    return value


def describe_file(path: Path) -> dict[str, int | str]:
    """Size and BLAKE2b digest of a regular file, as manifests list them.

    :raises OSError: it cannot be read; see ``open_regular``.
    """
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": digest}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, also after a power cut, finds all of it or what was there before.

    :raises OSError: it cannot be written; what was there is unchanged and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # a name that nobody can have planted
    try:
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
