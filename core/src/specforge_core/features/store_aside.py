# SPDX-License-Identifier: Apache-2.0
"""Where samples are written before they are visible, and how what a killed process left there is told from the rest.

A file aside is locked while its writer lives. It is named after the writer's machine: of another machine's lock a mount
may know nothing, so another machine's file is left alone until nobody has written it for an hour.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from specforge_core.features.file_lock import is_locked, lock_file

_FOLDER = ".aside"
_QUIET_SECONDS = 3600.0
_LOCK_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class AsideFile:
    """A file that its writer has open, and nobody else looks into."""

    path: Path
    descriptor: int

    def remove(self) -> int:
        """Give up what is aside; how many bytes that frees. Nothing where it was moved already."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return 0
        return os.fstat(self.descriptor).st_size


class Aside:
    """The folder of one store."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / _FOLDER
        self._machine = platform.node().replace("/", "-")

    @contextmanager
    def open(self) -> Iterator[AsideFile]:
        """A new file, locked; it is closed when the block ends, and removed where that ends with an error."""
        self._folder.mkdir(exist_ok=True)
        path, file = self._create()
        with file:
            aside = AsideFile(path, file.fileno())
            try:
                yield aside
            except BaseException:
                aside.remove()
                raise

    def _create(self) -> tuple[Path, FileIO]:
        while True:
            path = self._folder / f"{self._machine}.{os.urandom(8).hex()}"
            file = path.open("xb", buffering=0)
            if lock_file(file, seconds=_LOCK_SECONDS) and os.fstat(file.fileno()).st_nlink:
                return path, file
            file.close()  # a store that was being opened took it for abandoned before it was locked

    def sweep(self, now: float) -> int:
        """Remove what nobody will move any more; how many bytes the others are going to need.

        :param now: seconds since the epoch by the file system's clock.
        """
        nbytes = 0
        for path in self._folder.glob("*"):
            with suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
                if self._is_abandoned(path, file, now):
                    path.unlink()
                else:
                    nbytes += os.fstat(file.fileno()).st_size
        return nbytes

    def _is_abandoned(self, path: Path, file: FileIO, now: float) -> bool:
        if is_locked(file):
            return False
        return path.name.startswith(f"{self._machine}.") or now - os.fstat(file.fileno()).st_mtime > _QUIET_SECONDS
