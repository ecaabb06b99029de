# SPDX-License-Identifier: Apache-2.0
"""A world whose halves are joined by files on a small disk of their own, where one may be mounted."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

_DISK_BYTES = 24 << 20


class FileWires:
    """The `file` store and channel. ``small``: their disk has an end that can be reached."""

    def __init__(self, directory: Path) -> None:
        self.disk = directory / "disk"
        self.disk.mkdir()
        self.small = _mount(self.disk)
        self.store, self.refs = self.disk / "store", self.disk / "refs"
        self.sections: dict[str, dict[str, object]] = {
            "store": {"name": "file", "path": str(self.store)},
            "channel": {"name": "file", "path": str(self.refs), "writer_timeout_seconds": 2.0},
        }

    def put_keys(self) -> set[str]:
        """What is in the store at this moment."""
        return {path.name for path in self.store.glob("??/*.safetensors")}

    def fill(self) -> Path:
        """Take all the room there is; returns the file that has it."""
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue
        return filler

    def tear(self, path: Path) -> bool:
        """Append half a record, as a process that is killed in mid-append leaves it."""
        with path.open("rb") as whole:
            lines = whole.read().splitlines(keepends=True)
        if not lines:
            return False
        with path.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            file.write(lines[-1][: max(1, len(lines[-1]) // 2)])
        return True

    def leftovers(self, run: Path) -> list[str]:
        from specforge_core.contracts import PartContext
        from specforge_core.features.file_channel import FileChannel
        from specforge_core.hooks.builtin import FileChannelConfig

        found = [f"left in the store: {path.name}" for path in self.store.glob("[0-9a-f][0-9a-f]/*.safetensors")]
        found += [f"left aside in the store: {path.name}" for path in (self.store / ".aside").glob("*")]
        context = PartContext(run_id="oracle", directory=run)
        channel = FileChannel(FileChannelConfig(name="file", path=self.refs), context)
        writer, desk = channel.writer("oracle"), channel.leases()
        found += [f"left in flight: {ref.sample_id} g{ref.generation}" for ref in writer.published()]
        found += [f"left to capture: {batch.key}" for batch in desk.outstanding()]
        writer.close()
        desk.close()
        return found

    def close(self) -> None:
        if self.small:
            subprocess.run(["umount", "--lazy", str(self.disk)], capture_output=True, check=False)


def _mount(place: Path) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return subprocess.run(line, capture_output=True, check=False).returncode == 0
