# SPDX-License-Identifier: Apache-2.0
"""The built-in stores and channels, registered through the same hooks as everybody else's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from specforge_core.contracts import ChannelCapabilities, StoreCapabilities
from specforge_core.hooks.descriptors import FeatureStoreSpec, RefChannelSpec
from specforge_core.hooks.sections import FeatureStoreConfig, RefChannelConfig
from specforge_core.hooks.specs import hookimpl


class MemoryStoreConfig(FeatureStoreConfig):
    """Features in this process's memory."""

    capacity_bytes: int | None = Field(None, ge=1, description="StoreFull beyond it; default: no limit")


class FileStoreConfig(FeatureStoreConfig):
    """Features as files in a directory, which may be a shared mount."""

    path: Path | None = Field(None, description="default: inside the run's feature directory")
    capacity_bytes: int | None = Field(None, ge=1, description="StoreFull beyond it; default: the disk")

    def widens_trust(self) -> Mapping[str, str]:
        return {} if self.path is None else {"path": f"keep its features in {self.path}"}


class MemoryChannelConfig(RefChannelConfig):
    """Refs between threads of one process."""


class FileChannelConfig(RefChannelConfig):
    """Refs as append-only files in a directory, which may be a shared mount."""

    path: Path | None = Field(None, description="default: inside the run's feature directory")
    writer_timeout_seconds: float = Field(60.0, gt=0, description="a writer silent for longer is taken for dead")

    def widens_trust(self) -> Mapping[str, str]:
        return {} if self.path is None else {"path": f"keep its refs in {self.path}"}


@hookimpl
def specforge_feature_stores() -> list[FeatureStoreSpec]:
    return [
        FeatureStoreSpec(
            name="memory",
            config=MemoryStoreConfig,
            factory="specforge_core.features.memory_store:MemoryStore",
            capabilities=StoreCapabilities(),
            summary="tensors in this process's memory",
        ),
        FeatureStoreSpec(
            name="file",
            config=FileStoreConfig,
            factory="specforge_core.features.file_store:FileStore",
            capabilities=StoreCapabilities(cross_process=True, cross_host=True, durable=True),
            summary="one safetensors file per sample in a directory",
        ),
    ]


@hookimpl
def specforge_ref_channels() -> list[RefChannelSpec]:
    return [
        RefChannelSpec(
            name="memory",
            config=MemoryChannelConfig,
            factory="specforge_core.features.memory_channel:MemoryChannel",
            capabilities=ChannelCapabilities(),
            summary="refs between threads of one process",
        ),
        RefChannelSpec(
            name="file",
            config=FileChannelConfig,
            factory="specforge_core.features.file_channel:FileChannel",
            capabilities=ChannelCapabilities(cross_process=True, cross_host=True, durable=True, replayable=True),
            summary="append-only record files in a directory, one per writer",
        ),
    ]
