# SPDX-License-Identifier: Apache-2.0
"""Small installed distributions with real metadata on disk, for tests of discovery. Nothing is mocked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

STRATEGY = """\
from specforge_core import StrategyConfig, StrategySpec, hookimpl
from specforge_core.contracts import CaptureRequest


class Config(StrategyConfig):
    layers: tuple[int, ...] = (0,)
    norm: str = "post"
    dtype: str = "float32"

    def capture_request(self, info):
        return CaptureRequest(aux_layer_ids=self.layers, last_hidden_norm=self.norm, dtype=self.dtype)


@hookimpl
def specforge_strategies():
    return [StrategySpec(name="{name}", config=Config, factory="json:loads", summary="for tests")]
"""

TARGET = """\
from specforge_core import TargetEngineConfig, TargetEngineSpec, hookimpl
from specforge_core.contracts import EngineCapabilities, TargetInfo


class Config(TargetEngineConfig):
    def describe(self):
        return TargetInfo("somewhere", "Fake", 4, 8, 100, "float32", 16, 2, 2, 4, 1e-6, 128)


@hookimpl
def specforge_target_engines():
    capabilities = EngineCapabilities(norms=("post",), dtypes=("float32",))
    return [TargetEngineSpec(
        name="{name}", config=Config, factory="json:loads", tokenizer="json:loads", capabilities=capabilities
    )]
"""


def install(
    site: Path,
    distribution: str,
    *,
    groups: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str],
    version: str = "1.0",
    requires: str = "specforge-core>=0.1",
    origin: object = None,
    folder: str = "dist-info",
) -> None:
    """Put a distribution into ``site``: its metadata as an installer writes it, and its modules."""
    info = site / f"{distribution.replace('-', '_')}-{version}.{folder}"
    info.mkdir(parents=True)
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    name = "METADATA" if folder == "dist-info" else "PKG-INFO"
    (info / name).write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{requirement}")
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    if origin is not None:
        (info / "direct_url.json").write_text(origin if isinstance(origin, str) else json.dumps(origin))
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)


def install_strategy(site: Path, distribution: str, name: str, **more: object) -> None:
    """A working strategy called ``name``."""
    module = distribution.replace("-", "_")
    arguments: dict[str, object] = {
        "groups": {"specforge.strategies": {name: module}},
        "modules": {module: STRATEGY.replace("{name}", name)},
        **more,
    }
    install(site, distribution, **arguments)  # type: ignore[arg-type]


def install_target(site: Path, distribution: str, name: str) -> None:
    """A working target engine called ``name``: 4 layers, hidden size 8, 128 positions."""
    module = distribution.replace("-", "_")
    groups = {"specforge.target_engines": {name: module}}
    install(site, distribution, groups=groups, modules={module: TARGET.replace("{name}", name)})
