# SPDX-License-Identifier: Apache-2.0
"""SpecForge core: contracts, discovery and the pipeline that trains draft models.

The names below are what plugins may import besides ``specforge_core.contracts``, ``.modeling`` and ``.testing``.
They load on first use, so that ``import specforge_core`` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specforge_core.features.contents import VouchedStore
    from specforge_core.features.ref_codec import RefDecoder, RefEncoder
    from specforge_core.hooks.descriptors import (
        DemoTarget,
        FeatureStoreSpec,
        RefChannelSpec,
        StrategySpec,
        TargetEngineSpec,
    )
    from specforge_core.hooks.local_server import LocalServer, dying_with_parent, free_port, spawn
    from specforge_core.hooks.sections import (
        FeatureStoreConfig,
        OptimizerDefaults,
        RefChannelConfig,
        Section,
        StrategyConfig,
        TargetEngineConfig,
    )
    from specforge_core.hooks.specs import hookimpl

_PUBLIC = {
    "FeatureStoreConfig": "hooks.sections",
    "OptimizerDefaults": "hooks.sections",
    "RefChannelConfig": "hooks.sections",
    "Section": "hooks.sections",
    "StrategyConfig": "hooks.sections",
    "TargetEngineConfig": "hooks.sections",
    "RefDecoder": "features.ref_codec",
    "RefEncoder": "features.ref_codec",
    "VouchedStore": "features.contents",
    "DemoTarget": "hooks.descriptors",
    "FeatureStoreSpec": "hooks.descriptors",
    "RefChannelSpec": "hooks.descriptors",
    "StrategySpec": "hooks.descriptors",
    "TargetEngineSpec": "hooks.descriptors",
    "LocalServer": "hooks.local_server",
    "dying_with_parent": "hooks.local_server",
    "free_port": "hooks.local_server",
    "spawn": "hooks.local_server",
    "hookimpl": "hooks.specs",
}

__all__ = [
    "DemoTarget",
    "FeatureStoreConfig",
    "FeatureStoreSpec",
    "LocalServer",
    "OptimizerDefaults",
    "RefChannelConfig",
    "RefChannelSpec",
    "RefDecoder",
    "RefEncoder",
    "Section",
    "StrategyConfig",
    "StrategySpec",
    "TargetEngineConfig",
    "TargetEngineSpec",
    "VouchedStore",
    "dying_with_parent",
    "free_port",
    "hookimpl",
    "spawn",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
