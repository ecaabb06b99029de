# SPDX-License-Identifier: Apache-2.0
"""A plan: the run file with its four parts resolved and found to fit together, without importing torch.

``capture``, ``train`` and ``run`` start from the plan that ``specforge plan`` prints. ``config.checks`` holds what is
compared; here the parts are resolved and everything that does not fit is reported at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from specforge_core.config.checks import Composition, find_mismatches
from specforge_core.config.load import LoadedConfig
from specforge_core.config.run_config import RunConfig
from specforge_core.config.topologies import TOPOLOGIES
from specforge_core.config.trust import find_unconfirmed
from specforge_core.config.validation import validate_section
from specforge_core.contracts import CaptureRequest, FeatureSpec, PlanError, PluginError, SpecForgeError, TargetInfo
from specforge_core.contracts.redaction import show_value, without_secrets
from specforge_core.hooks.descriptors import (
    FeatureStoreSpec,
    PartSpec,
    RefChannelSpec,
    StrategySpec,
    TargetEngineSpec,
)
from specforge_core.hooks.foreign import foreign_code
from specforge_core.hooks.kinds import KINDS, PARTS, Kind
from specforge_core.hooks.manager import PluginRegistry
from specforge_core.hooks.sections import (
    OptimizerDefaults,
    PluginSection,
    StrategyConfig,
    TargetEngineConfig,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run that composes.

    :param config: the run file as core understands it.
    :param provenance: distribution, version and origin of each part, by ``kind:name``.
    :param info: the target, from its configuration.
    :param request: what is captured of it.
    """

    config: RunConfig
    strategy: StrategySpec
    strategy_section: StrategyConfig
    target_engine: TargetEngineSpec
    target_section: TargetEngineConfig
    feature_store: FeatureStoreSpec
    store_section: PluginSection
    ref_channel: RefChannelSpec
    channel_section: PluginSection
    provenance: Mapping[str, Mapping[str, str]]
    info: TargetInfo
    request: CaptureRequest

    @property
    def feature_reuse(self) -> bool:
        """Offline: one capture serves every epoch. Online: each epoch captures its samples anew."""
        return self.config.topology == "offline"

    @property
    def run_id(self) -> str:
        """What the run's processes call it: ``run.id``, or the last part of ``run.directory``."""
        return self.config.run.id or self.config.run.directory.resolve().name

    @property
    def retain(self) -> Literal["never", "window", "checkpoint"]:
        """When the loader frees features: never offline; else as ``loading.retain`` says."""
        if self.feature_reuse:
            return "never"
        outlives = self.feature_store.capabilities.cross_process
        return self.config.loading.retain or ("checkpoint" if outlives else "window")

    @property
    def tensors(self) -> tuple[FeatureSpec, ...]:
        """What one sample of ``data.max_length`` tokens consists of."""
        return self.request.specs(self.config.data.max_length, self.info.hidden_size)

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.nbytes for spec in self.request.specs(1, self.info.hidden_size))

    @property
    def bytes_per_sample(self) -> int:
        """Of the longest sample: ``data.max_length`` tokens."""
        return self.bytes_per_token * self.config.data.max_length

    @property
    def bytes_per_window(self) -> int:
        """Of a window of longest samples."""
        return self.bytes_per_sample * self.config.training.global_batch_size

    def halves(self) -> dict[str, str]:
        """What each half of the run will do."""
        needs, capture = TOPOLOGIES[self.config.topology], self.config.capture
        capturing = f"{needs.capture_half}; {capture.batch_size} prompts per prefill"
        if not self.feature_reuse:
            capturing += (
                f"; stops at {capture.high_watermark_windows} windows in flight, "
                f"goes on below {capture.low_watermark_windows}"
            )
        training = self.config.training
        freeing = {
            "never": "features are kept",
            "window": "features are freed with their window",
            "checkpoint": f"features are freed once a checkpoint (every {self.config.checkpoint.every_steps} steps) "
            "covers them",
        }
        return {
            "capture": capturing,
            "train": f"{needs.train_half}; {freeing[self.retain]}; "
            f"{training.global_batch_size} samples per window in micro-batches of "
            f"{training.micro_batch_size}, {training.epochs} epoch(s)",
        }

    @property
    def optimizer(self) -> OptimizerDefaults:
        """What the run trains with: its own settings, and the strategy's where it says nothing."""
        training = self.config.training
        given = {
            "learning_rate": training.learning_rate,
            "warmup_ratio": training.warmup_ratio,
            "max_grad_norm": training.max_grad_norm,
        }
        own = {name: value for name, value in given.items() if value is not None}
        return self.strategy_section.optimizer_defaults.model_copy(update=own)

    def resolved(self) -> dict[str, Any]:
        """The run file with every default written out; loading it, and saying its secrets again, gives this plan."""
        values = self.config.model_dump(mode="json")
        values["strategy"] = self.strategy_section.model_dump(mode="json")
        values["target"] = self.target_section.model_dump(mode="json")
        values["store"] = self.store_section.model_dump(mode="json")
        values["channel"] = self.channel_section.model_dump(mode="json")
        values["training"].update(self.optimizer.model_dump(mode="json"))
        return cast("dict[str, Any]", without_secrets(values))

    def as_json(self) -> dict[str, Any]:
        """Everything ``specforge plan`` shows."""
        return {
            "config": self.resolved(),
            "parts": {key: dict(value) for key, value in self.provenance.items()},
            "target": asdict(self.info),
            "request": asdict(self.request),
            "tensors": [asdict(spec) for spec in self.tensors],
            "bytes": {
                "per_token": self.bytes_per_token,
                "per_sample": self.bytes_per_sample,
                "per_window": self.bytes_per_window,
            },
            "feature_reuse": self.feature_reuse,
            "halves": self.halves(),
        }


def compose(loaded: LoadedConfig, registry: PluginRegistry) -> Plan:
    """Resolve the parts that a run file names and check that they fit together.

    :raises PlanError: every mismatch found, each with what to change.
    """
    config, needs = loaded.config, TOPOLOGIES[loaded.config.topology]
    parts = _Resolver(loaded, registry)
    sections: dict[Kind, dict[str, Any]] = {
        "strategy": config.strategy,
        "target-engine": config.target,
        "feature-store": config.store or {"name": needs.default_store},
        "ref-channel": config.channel or {"name": needs.default_channel},
    }
    for kind in PARTS:
        parts.resolve(kind, sections[kind])
    unconfirmed = find_unconfirmed(loaded, parts.sections)
    if unconfirmed:  # nothing is asked of the target, which may be elsewhere
        raise PlanError([*parts.problems, *unconfirmed], where=str(loaded.path))
    info = parts.describe_target()
    request = parts.request_capture(info)
    mismatches = parts.problems + find_mismatches(
        Composition(
            loaded=loaded,
            engine=cast("TargetEngineSpec | None", parts.specs.get("target")),
            store=cast("FeatureStoreSpec | None", parts.specs.get("store")),
            channel=cast("RefChannelSpec | None", parts.specs.get("channel")),
            strategy_section=cast("StrategyConfig | None", parts.sections.get("strategy")),
            info=info,
            request=request,
        )
    )
    if mismatches or info is None or request is None:
        raise PlanError(mismatches, where=str(loaded.path))
    return Plan(
        config=config,
        strategy=cast(StrategySpec, parts.specs["strategy"]),
        strategy_section=cast(StrategyConfig, parts.sections["strategy"]),
        target_engine=cast(TargetEngineSpec, parts.specs["target"]),
        target_section=cast(TargetEngineConfig, parts.sections["target"]),
        feature_store=cast(FeatureStoreSpec, parts.specs["store"]),
        store_section=parts.sections["store"],
        ref_channel=cast(RefChannelSpec, parts.specs["channel"]),
        channel_section=parts.sections["channel"],
        provenance=registry.provenance(parts.chosen),
        info=info,
        request=request,
    )


class _Resolver:
    """Resolves one part after another, by their keys in the run file, and gathers what goes wrong.

    The registry has verified that a part of each kind has that kind's descriptor and section.
    """

    def __init__(self, loaded: LoadedConfig, registry: PluginRegistry) -> None:
        self._loaded = loaded
        self._registry = registry
        self.specs: dict[str, PartSpec] = {}
        self.sections: dict[str, PluginSection] = {}
        self.chosen: list[tuple[Kind, str]] = []
        self.problems: list[str] = []

    def resolve(self, kind: Kind, values: Mapping[str, Any]) -> None:
        """Load the part that the kind's section names, and check the section as its plugin wants it."""
        key = KINDS[kind].section
        name = values.get("name")
        if not isinstance(name, str):
            names = self._registry.names(kind)
            choice = f"one of: {', '.join(names)}" if names else f"no {kind} is installed"
            problem = "is missing" if name is None else f"must be text, got {show_value(name)}"
            self.problems.append(f"{self._loaded.locate((key, 'name'))}: {problem} ({choice})")
            return
        try:
            spec = self._registry.part(kind, name)
        except PluginError as error:
            self.problems.append(f"{self._loaded.locate((key, 'name'))}: {error}")
            return
        self.specs[key] = spec
        self.chosen.append((kind, name))
        with self._settings_code(kind, name):
            section, problems = validate_section(spec.config, values, locate=self._loaded.locate, keys=(key,))
            self.problems += [f"{where}: {what}" for where, what in problems]
            if section is not None:
                self.sections[key] = section

    def describe_target(self) -> TargetInfo | None:
        section = self.sections.get("target")
        if section is None:
            return None
        with self._settings_code("target-engine", section.name):
            return cast(TargetEngineConfig, section).describe()
        return None

    def request_capture(self, info: TargetInfo | None) -> CaptureRequest | None:
        section = self.sections.get("strategy")
        if section is None or info is None:
            return None
        with self._settings_code("strategy", section.name):
            return cast(StrategyConfig, section).capture_request(info)
        return None

    @contextmanager
    def _settings_code(self, kind: Kind, name: str) -> Iterator[None]:
        """While a plugin's code looks at its settings: what it refuses is a problem, and so is what it fails with."""
        where = self._loaded.locate((KINDS[kind].section,))
        distribution = self._registry.choose(kind, name).distribution

        def broken(said: str) -> PluginError:
            return PluginError(f"{distribution} failed on these settings: {said}", hint=f"report it to {distribution}")

        try:
            with foreign_code(broken):
                try:
                    yield
                except SpecForgeError as error:
                    self.problems.append(f"{where}: {error}")
        except PluginError as error:
            _log.debug("%s", error, exc_info=True)
            self.problems.append(f"{where}: {error}")
