# SPDX-License-Identifier: Apache-2.0
"""The authoring tutorial as files: every fenced block that follows a line with nothing but a path in bold code."""

from __future__ import annotations

import re
from pathlib import Path

TUTORIAL = Path(__file__).parents[2] / "docs" / "authoring" / "tutorial.md"
_FILE = re.compile(r"^\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def tutorial_files() -> dict[str, str]:
    """Paths below the tutorial's folder, and what belongs into them."""
    return dict(_FILE.findall(TUTORIAL.read_text(encoding="utf-8")))


def write_tutorial(directory: Path) -> Path:
    """Write the tutorial's distribution as a reader would; returns ``directory``."""
    for name, text in tutorial_files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory
