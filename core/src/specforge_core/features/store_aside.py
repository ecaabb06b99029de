# SPDX-License-Identifier: Apache-2.0
"""Where samples are written before they are visible, and how what a killed process left there is told from the rest.

A file aside is locked while its writer lives. It is named after the writer's machine: of another machine's lock a mount
may know nothing, so another machine's file is left alone until nobody has written it for an hour. What is no regular
file was planted there, and is left alone.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from specforge_core.contracts.files import make_directory, open_directory, open_regular
from specforge_core.features.file_lock import is_locked, lock_file

_FOLDER = ".aside"
_QUIET_SECONDS = 3600.0
_LOCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class AsideFile:
    """A file that its writer has open, and nobody else looks into.

    :param folder: the open folder that ``name`` is in.
    """

    folder: int
    name: str
    descriptor: int

    def remove(self) -> int:
        """Give up what is aside; how many bytes that frees. Nothing where it was moved already."""
        try:
            os.unlink(self.name, dir_fd=self.folder)
        except FileNotFoundError:
            return 0
        return os.fstat(self.descriptor).st_size


class Aside:
    """The folder of one store."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FOLDER
        self._machine = platform.node().replace("/", "-")

    @contextmanager
    def open(self) -> Iterator[AsideFile]:
        """A new file, locked; it is closed when the block ends, and removed where that ends with an error.

        :raises OSError: it cannot be made, or a link is in the folder's place.
        """
        make_directory(self._path)
        with self._opened() as folder:
            name, file = self._create(folder)
            with file:
                aside = AsideFile(folder, name, file.fileno())
                try:
                    yield aside
                except BaseException:
                    aside.remove()
                    raise

    def _create(self, folder: int) -> tuple[str, FileIO]:
        while True:
            name = f"{self._machine}.{secrets.token_hex(8)}"
            file = FileIO(open_regular(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=folder), "wb")
            if lock_file(file, seconds=_LOCK_SECONDS) and os.fstat(file.fileno()).st_nlink:
                return name, file
            file.close()  # a store that was being opened took it for abandoned before it was locked

    def sweep(self, now: float) -> int:
        """Remove what nobody will move any more; how many bytes the others are going to need.

        :param now: seconds since the epoch by the file system's clock.
        :raises OSError: a link or a file is in the folder's place.
        """
        nbytes = 0
        with suppress(FileNotFoundError), self._opened() as folder:
            for name in os.listdir(folder):
                with suppress(OSError):  # it is gone, or no file that a store made
                    nbytes += self._sweep_one(name, folder, now)
        return nbytes

    def _sweep_one(self, name: str, folder: int, now: float) -> int:
        with FileIO(open_regular(name, os.O_RDONLY, dir_fd=folder)) as file:
            if not self._is_abandoned(name, file, now):
                return os.fstat(file.fileno()).st_size
            os.unlink(name, dir_fd=folder)
            return 0

    def _is_abandoned(self, name: str, file: FileIO, now: float) -> bool:
        if is_locked(file):
            return False
        return name.startswith(f"{self._machine}.") or now - os.fstat(file.fileno()).st_mtime > _QUIET_SECONDS

    @contextmanager
    def _opened(self) -> Iterator[int]:
        folder = open_directory(self._path)
        try:
            yield folder
        finally:
            os.close(folder)
