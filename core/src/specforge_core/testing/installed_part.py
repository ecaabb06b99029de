# SPDX-License-Identifier: Apache-2.0
"""The contract suite of a part that a plugin offers, made from its descriptor: what ``specforge plugins check`` runs.

The descriptor's ``example`` holds the settings to try it with. A plugin's own tests subclass the suite instead: they
can say more, such as how to reach a store's bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge_core.contracts import FeatureStore, PartContext, RefChannel, TargetEngine
from specforge_core.hooks.descriptors import (
    FeatureStoreSpec,
    PartSpec,
    RefChannelSpec,
    StrategySpec,
    TargetEngineSpec,
    resolve,
)
from specforge_core.testing.conformance import ContractSuite
from specforge_core.testing.feature_store_suite import FeatureStoreSuite
from specforge_core.testing.ref_channel_suite import RefChannelSuite
from specforge_core.testing.strategy_suite import StrategySuite
from specforge_core.testing.target_engine_suite import TargetEngineSuite


def suite_of(offered: PartSpec) -> type[ContractSuite] | None:
    """A suite on the part as a run would construct it, or None where its descriptor gives no example."""
    if offered.example is None:
        return None
    settings = {"name": offered.name, **offered.example}
    match offered:
        case StrategySpec():
            return _strategy_suite(offered)
        case TargetEngineSpec():
            return _engine_suite(offered, settings)
        case FeatureStoreSpec():
            return _store_suite(offered, settings)
        case RefChannelSpec():
            return _channel_suite(offered, settings)


def _context(directory: Path, token: str | None = None) -> PartContext:
    return PartContext(run_id="check", directory=directory, token=token)


def _strategy_suite(offered: StrategySpec) -> type[ContractSuite]:
    class InstalledStrategy(StrategySuite):
        name = offered.name
        settings = offered.example
        thorough = frozenset({"test_plugin_module_imports_no_torch"})  # the check says so by itself

        def spec(self) -> StrategySpec:
            return offered

    return InstalledStrategy


def _engine_suite(offered: TargetEngineSpec, settings: dict[str, Any]) -> type[ContractSuite]:
    class InstalledEngine(TargetEngineSuite):
        capabilities = offered.capabilities

        def make_engine(self) -> TargetEngine:
            engine: TargetEngine = resolve(offered.factory)(offered.config.model_validate(settings))
            return engine

    return InstalledEngine


def _store_suite(offered: FeatureStoreSpec, settings: dict[str, Any]) -> type[ContractSuite]:
    class InstalledStore(FeatureStoreSuite):
        limits_capacity = "capacity_bytes" in offered.config.model_fields
        cross_process = offered.capabilities.cross_process

        def make_store(
            self, directory: Path, capacity_bytes: int | None = None, token: str | None = None
        ) -> FeatureStore:
            limit = {} if capacity_bytes is None else {"capacity_bytes": capacity_bytes}
            section = offered.config.model_validate({**settings, **limit})
            store: FeatureStore = resolve(offered.factory)(section, _context(directory, token))
            return store

    return InstalledStore


def _channel_suite(offered: RefChannelSpec, settings: dict[str, Any]) -> type[ContractSuite]:
    class InstalledChannel(RefChannelSuite):
        replayable = offered.capabilities.replayable
        cross_process = offered.capabilities.cross_process

        def make_channel(self, directory: Path) -> RefChannel:
            section = offered.config.model_validate(settings)
            channel: RefChannel = resolve(offered.factory)(section, _context(directory))
            return channel

    return InstalledChannel
