# SPDX-License-Identifier: Apache-2.0
"""Descriptors: what a plugin's hooks return. Light, frozen values; the heavy part is named, not imported.

``factory`` and the like are ``"module:attribute"`` strings, resolved by :func:`resolve` at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from specforge_core.contracts import ChannelCapabilities, EngineCapabilities, PluginError, StoreCapabilities
from specforge_core.hooks.foreign import foreign_code
from specforge_core.hooks.kinds import Kind
from specforge_core.hooks.sections import (
    FeatureStoreConfig,
    PluginSection,
    RefChannelConfig,
    StrategyConfig,
    TargetEngineConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec:
    """A strategy.

    :param name: the entry point's name; what ``strategy: {name: …}`` says.
    :param config: its section of the run file.
    :param factory: ``"module:Class"``; called with the section, gives a Strategy.
    :param summary: one line for listings.
    :param export_formats: formats its ``export`` writes; the first is the default.
    :param golden: ``"module:function"`` that runs one golden vector (see ``specforge_core.testing.golden``).
    :param example: settings with which ``specforge plugins check`` runs the contract suite, whose target has 12 layers
        of hidden size 32.
    :param demo: ``"package:path"`` of the run file, shipped as package data, that ``specforge demo`` runs.
    """

    kind: ClassVar[Kind] = "strategy"
    section: ClassVar[type[PluginSection]] = StrategyConfig

    name: str
    config: type[StrategyConfig]
    factory: str
    summary: str = ""
    export_formats: tuple[str, ...] = ()
    golden: str = ""
    demo: str = ""
    example: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEngineSpec:
    """A target engine.

    :param factory: ``"module:Class"``; called with the section, gives a TargetEngine.
    :param tokenizer: ``"module:function"``; called with the section, gives a ChatTokenizer.
    :param demo: ``"module:function"``; called with a cache directory and a Progress, gives a :class:`DemoTarget`.
    :param example: settings of a small target with which ``specforge plugins check`` runs the contract suite; None
        where there is none to be had without files or a server.
    """

    kind: ClassVar[Kind] = "target-engine"
    section: ClassVar[type[PluginSection]] = TargetEngineConfig

    name: str
    config: type[TargetEngineConfig]
    factory: str
    tokenizer: str
    capabilities: EngineCapabilities
    summary: str = ""
    demo: str = ""
    example: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStoreSpec:
    """A feature store.

    :param factory: ``"module:Class"``; called with the section and a PartContext.
    :param example: settings with which ``specforge plugins check`` runs the contract suite; None where it cannot (it
        would need a server, say).
    :param service: ``"module:function"`` that runs the server this part needs, for development, until it is stopped;
        what ``specforge services NAME`` calls. Empty: the part needs none.
    """

    kind: ClassVar[Kind] = "feature-store"
    section: ClassVar[type[PluginSection]] = FeatureStoreConfig

    name: str
    config: type[FeatureStoreConfig]
    factory: str
    capabilities: StoreCapabilities
    summary: str = ""
    example: Mapping[str, object] | None = field(default_factory=dict)
    service: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefChannelSpec:
    """A ref channel.

    :param factory: ``"module:Class"``; called with the section and a PartContext.
    :param example: settings with which ``specforge plugins check`` runs the contract suite; None where it cannot (it
        would need a server, say).
    :param service: ``"module:function"`` that runs the server this part needs, for development, until it is stopped;
        what ``specforge services NAME`` calls. Empty: the part needs none.
    """

    kind: ClassVar[Kind] = "ref-channel"
    section: ClassVar[type[PluginSection]] = RefChannelConfig

    name: str
    config: type[RefChannelConfig]
    factory: str
    capabilities: ChannelCapabilities
    summary: str = ""
    example: Mapping[str, object] | None = field(default_factory=dict)
    service: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoTarget:
    """A small real target that an engine made for ``specforge demo``, with prompts that it is to answer.

    :param section: what the run file's ``target`` section must say besides ``name``.
    :param answer_tokens: the most that an answer may have.
    """

    section: Mapping[str, str]
    train_prompts: Path
    eval_prompts: Path
    answer_tokens: int


PartSpec = StrategySpec | TargetEngineSpec | FeatureStoreSpec | RefChannelSpec
SPECS: Mapping[Kind, type[PartSpec]] = {
    spec.kind: spec for spec in (StrategySpec, TargetEngineSpec, FeatureStoreSpec, RefChannelSpec)
}


def resolve(path: str) -> Any:
    """Import what a ``"module:attribute"`` string names.

    :raises PluginError: the module does not import, whatever it raises, or lacks the attribute.
    """
    module_name, _, attribute = path.partition(":")

    def broken(failure: str) -> PluginError:
        hint = "reinstall the distribution that provides it, with its extras"
        return PluginError(f"{path} cannot be loaded: {failure}", hint=hint)

    with foreign_code(broken):
        return getattr(importlib.import_module(module_name), attribute)
