# SPDX-License-Identifier: Apache-2.0
"""What somebody else plants in the directory of a store or channel: links that lead out of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path


def copies_with_a_link(directory: Path, place: Path) -> Iterator[tuple[Path, Path]]:
    """A copy of ``directory`` for everything that is in it, with a link in place of that one thing; and where it leads.

    :param place: an existing directory for the copies and for what lies outside of them.
    """
    for number, path in enumerate(sorted(directory.rglob("*"))):
        copy, outside = place / f"copy-{number}", place / f"outside-{number}"
        shutil.copytree(directory, copy)
        planted = copy / path.relative_to(directory)
        shutil.move(planted, outside)
        planted.symlink_to(outside)
        yield copy, outside


def snapshot(path: Path) -> dict[str, tuple[bytes, int]]:
    """Names, contents and times of a file, or of everything in a directory."""
    paths = [path, *sorted(path.rglob("*"))]
    return {str(p): (p.read_bytes() if p.is_file() else b"", p.stat().st_mtime_ns) for p in paths}
