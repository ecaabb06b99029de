# SPDX-License-Identifier: Apache-2.0
"""Environments that see nothing of this repository but what is installed into them.

Third-party packages are shared with the environment that runs the tests (torch alone is hundreds of megabytes), through
a directory of links that leaves out everything of ours, editable installs and ``.pth`` files included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECTS = {
    "specforge-core": ROOT / "core",
    "specforge-eagle3": ROOT / "specforge_eagle3",
    "specforge-hf-target": ROOT / "plugins" / "hf-target",
}
SECONDS = 240
_NOT_SHARED = ("specforge", "_editable_impl", "__editable__", "pip", "distutils-precedence")


def run_checked(*command: str | Path, cwd: Path) -> str:
    """Run to the end; a failure shows what was printed."""
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment of its own."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def install(self, *wheels: Path) -> None:
        """Without the package index; requirements must be met by what is there."""
        self._pip("install", "--no-index", *wheels)

    def uninstall(self, *distributions: str) -> None:
        self._pip("uninstall", "--yes", *distributions)

    def _pip(self, *arguments: str | Path) -> None:
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", self.python)
        run_checked(*pip, *arguments, cwd=self.directory)

    def specforge(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The installed command, with no trace of this process's environment."""
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "SPECFORGE_DISABLE_PLUGINS")
        variables = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [self.directory / "bin" / "specforge", *arguments],
            cwd=cwd or self.directory,
            env={**variables, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )


def create_environment(parent: Path) -> CleanEnvironment:
    """An empty environment in which third-party packages can be imported and nothing of ours."""
    directory = parent / "environment"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(directory)
    shared = parent / "third-party"
    shared.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if not item.name.startswith(_NOT_SHARED) and item.suffix != ".pth":
            (shared / item.name).symlink_to(item)
    [site] = directory.glob("lib/python*/site-packages")
    (site / "third_party.pth").write_text(f"{shared}\n")
    return CleanEnvironment(directory)
