# SPDX-License-Identifier: Apache-2.0
"""Base classes of the run file's sections. A plugin's section is a subclass that lives in the plugin.

Everything here is read by ``specforge plan``, so nothing here, nor in a subclass, imports torch at module level.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from specforge_core.contracts import CaptureRequest, TargetInfo


class Section(BaseModel):
    """A part of the run file: unknown keys and numbers that are none are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class PluginSection(Section):
    """A section whose ``name`` chooses the plugin (an entry point's name)."""

    name: str

    def widens_trust(self) -> Mapping[str, str]:
        """Keys whose values let a run do more than read local files as data, and what that is: run code, connect to
        somebody, write outside the run directory, use a secret. (``{"url": "connect to host:port"}``)

        Where the section comes from a run directory that somebody else may have made, each must be said again on the
        command line. Asked before anything else of the section is used.
        """
        return {}


class OptimizerDefaults(Section):
    """What a strategy trains with unless the run file says otherwise."""

    learning_rate: float = 1e-4
    warmup_ratio: float = 0.015
    max_grad_norm: float = 0.5


class StrategyConfig(PluginSection, ABC):
    """A strategy's section."""

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults()

    @abstractmethod
    def capture_request(self, info: TargetInfo) -> CaptureRequest:
        """What must be captured of this target.

        :raises ConfigError: settings that this target cannot serve (a layer out of range, say).
        """

    def check(self, info: TargetInfo) -> list[str]:
        """Everything else in this section that does not fit this target, each with what to change."""
        return []


class TargetEngineConfig(PluginSection, ABC):
    """A target engine's section."""

    @abstractmethod
    def describe(self) -> TargetInfo:
        """The target as its configuration describes it; reads no weights and imports no torch.

        :raises TargetError: no such target, or one that is not understood.
        """


class FeatureStoreConfig(PluginSection):
    """A feature store's section."""


class RefChannelConfig(PluginSection):
    """A ref channel's section."""
