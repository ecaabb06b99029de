# SPDX-License-Identifier: Apache-2.0
"""What this distribution offers to SpecForge: the ``mooncake`` store. Imports neither torch nor mooncake."""

from __future__ import annotations

from specforge_core import FeatureStoreSpec, hookimpl
from specforge_core.contracts import StoreCapabilities

from specforge_mooncake_store.config import MooncakeStoreConfig


@hookimpl
def specforge_feature_stores() -> list[FeatureStoreSpec]:
    return [
        FeatureStoreSpec(
            name="mooncake",
            config=MooncakeStoreConfig,
            factory="specforge_mooncake_store.store:MooncakeStore",
            capabilities=StoreCapabilities(cross_process=True, cross_host=True),
            summary="tensors in the memory of the run's machines, over TCP or RDMA",
            example=None,
            service="specforge_mooncake_store.service:serve",
        )
    ]
