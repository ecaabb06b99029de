# SPDX-License-Identifier: Apache-2.0
"""Built wheels and clean environments to install them into."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from clean_environment import PROJECTS, CleanEnvironment, create_environment, run_checked


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each distribution's wheel, built from the source distribution that was built from this tree."""
    built = {}
    for name, project in PROJECTS.items():
        out = tmp_path_factory.mktemp(name)
        run_checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, project, cwd=out)
        [built[name]] = out.glob("*.whl")
    return built


@pytest.fixture
def clean_environment(tmp_path: Path) -> CleanEnvironment:
    """An environment of one test."""
    return create_environment(tmp_path)


@pytest.fixture(scope="session")
def build_wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Builds a one-module strategy plugin from its source."""

    def build(distribution: str, strategy: str, source: str) -> Path:
        module = distribution.replace("-", "_")
        project = tmp_path_factory.mktemp(distribution)
        (project / f"{module}.py").write_text(source)
        (project / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "{distribution}"\nversion = "3.1"\ndependencies = ["specforge-core"]\n'
            f'[project.entry-points."specforge.strategies"]\n{strategy} = "{module}"\n'
            f'[tool.hatch.build.targets.wheel]\nonly-include = ["{module}.py"]\n'
        )
        run_checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=project)
        [wheel] = (project / "dist").glob("*.whl")
        return wheel

    return build
