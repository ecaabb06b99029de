# SPDX-License-Identifier: Apache-2.0
"""The hooks a plugin may implement. Their names are public API: changing one is a breaking change.

The part hooks return descriptors. The observer hooks are called with keyword arguments while a run goes on and may
not change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from specforge_core.hooks.descriptors import FeatureStoreSpec, RefChannelSpec, StrategySpec, TargetEngineSpec

PROJECT = "specforge"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def specforge_strategies() -> Iterable[StrategySpec]:  # type: ignore[empty-body]
    """Strategies this plugin offers, one per entry point in ``specforge.strategies``."""


@hookspec
def specforge_target_engines() -> Iterable[TargetEngineSpec]:  # type: ignore[empty-body]
    """Target engines this plugin offers, one per entry point in ``specforge.target_engines``."""


@hookspec
def specforge_feature_stores() -> Iterable[FeatureStoreSpec]:  # type: ignore[empty-body]
    """Feature stores this plugin offers, one per entry point in ``specforge.feature_stores``."""


@hookspec
def specforge_ref_channels() -> Iterable[RefChannelSpec]:  # type: ignore[empty-body]
    """Ref channels this plugin offers, one per entry point in ``specforge.ref_channels``."""


@hookspec
def specforge_run_started(run: str) -> None:
    """Training begins. ``run``: the run directory."""


@hookspec
def specforge_window_trained(run: str, step: int, metrics: Mapping[str, float]) -> None:
    """An optimizer step is done."""


@hookspec
def specforge_evaluated(run: str, step: int, metrics: Mapping[str, float]) -> None:
    """Held-out features were evaluated after optimizer step ``step``."""


@hookspec
def specforge_checkpoint_saved(run: str, step: int, path: Path) -> None:
    """A complete checkpoint is on disk."""


@hookspec
def specforge_run_finished(run: str, outcome: str) -> None:
    """Training ended: ``finished``, ``stopped`` or ``failed``."""
