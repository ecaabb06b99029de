# SPDX-License-Identifier: Apache-2.0
"""Loads chosen plugins: import, register with pluggy, verify the hooks, take the one descriptor that was asked for.

``hooks.discovery`` says what is installed; this is the only place where plugin code is imported. Whatever a plugin
does wrong becomes a :class:`PluginError` that names its distribution.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any, cast

import pluggy

from specforge_core.contracts import PluginError
from specforge_core.contracts.redaction import show_value
from specforge_core.hooks import specs
from specforge_core.hooks.descriptors import (
    SPECS,
    FeatureStoreSpec,
    PartSpec,
    RefChannelSpec,
    StrategySpec,
    TargetEngineSpec,
)
from specforge_core.hooks.discovery import PluginEntry, list_entries, suggest
from specforge_core.hooks.foreign import foreign_code
from specforge_core.hooks.kinds import KINDS, PARTS, Kind
from specforge_core.hooks.observers import OBSERVER_HOOKS, Observers

_log = logging.getLogger(__name__)

_PREFIX = "specforge_"


class PluginRegistry:
    """The installed plugins, and those of them that were loaded."""

    def __init__(self, entries: Iterable[PluginEntry]) -> None:
        self._entries = list(entries)
        self._manager = pluggy.PluginManager(specs.PROJECT)
        self._manager.add_hookspecs(specs)
        self._descriptors: dict[tuple[Kind, str], PartSpec] = {}
        self._observers: Observers | None = None

    @classmethod
    def discover(cls, disabled: Collection[str] = ()) -> PluginRegistry:
        """Read what is installed; imports no plugin.

        :param disabled: names, distributions, ``distribution:name`` or ``kind:name`` that must not be used.
        :raises PluginError: one of them is not installed.
        """
        return cls(list_entries(disabled))

    def entries(self) -> list[PluginEntry]:
        """What is installed, sorted by kind and name."""
        return list(self._entries)

    def names(self, kind: Kind) -> list[str]:
        """Names of that kind which can be chosen (imports nothing)."""
        return [entry.name for entry in self._entries if entry.kind == kind and entry.status == "ok"]

    def find(self, name: str) -> list[PluginEntry]:
        """Entries of any kind that ``name`` means: a name, a distribution, or ``kind:name``.

        :raises PluginError: there is none.
        """
        found = [entry for entry in self._entries if entry.matches(name)]
        if found:
            return found
        known = {entry.name for entry in self._entries} | {entry.distribution for entry in self._entries}
        raise PluginError(
            f"no plugin named {name!r} is installed",
            hint=suggest(name, known) or "`specforge plugins` lists what is installed",
        )

    def strategy(self, name: str) -> StrategySpec:
        """:raises PluginError: it cannot be chosen, or does not load."""
        return cast(StrategySpec, self.part("strategy", name))

    def target_engine(self, name: str) -> TargetEngineSpec:
        """:raises PluginError: it cannot be chosen, or does not load."""
        return cast(TargetEngineSpec, self.part("target-engine", name))

    def feature_store(self, name: str) -> FeatureStoreSpec:
        """:raises PluginError: it cannot be chosen, or does not load."""
        return cast(FeatureStoreSpec, self.part("feature-store", name))

    def ref_channel(self, name: str) -> RefChannelSpec:
        """:raises PluginError: it cannot be chosen, or does not load."""
        return cast(RefChannelSpec, self.part("ref-channel", name))

    def part(self, kind: Kind, name: str) -> PartSpec:
        """The descriptor of a part, whose plugin is imported now if it was not.

        :raises PluginError: it is not installed, disabled, in conflict, incompatible or broken.
        """
        if (kind, name) not in self._descriptors:
            self._descriptors[kind, name] = self._load_descriptor(self.choose(kind, name))
        return self._descriptors[kind, name]

    def choose(self, kind: Kind, name: str) -> PluginEntry:
        """The one entry that a run file's ``name`` means; imports nothing.

        :raises PluginError: it is not installed, disabled, in conflict, incompatible or broken.
        """
        candidates = [entry for entry in self._entries if (entry.kind, entry.name) == (kind, name)]
        if not candidates:
            raise self._missing(kind, name)
        enabled = [entry for entry in candidates if entry.status != "disabled"]
        if not enabled:
            entry = candidates[0]
            raise PluginError(
                f"{kind} {name!r} of {entry.source} is {entry.detail}", hint="enable it or choose another"
            )
        if len(enabled) > 1:
            raise _conflict(enabled)
        entry = enabled[0]
        if entry.status == "incompatible":
            hint = f"pip install --upgrade {entry.distribution}, or install the core it asks for"
            raise PluginError(f"{kind} {name!r} of {entry.source} {entry.detail}", hint=hint)
        if entry.status != "ok":
            hint = f"reinstall or uninstall {entry.distribution}"
            raise PluginError(f"{kind} {name!r} of {entry.source} is broken: {entry.detail}", hint=hint)
        return entry

    def observers(self) -> Observers:
        """Every enabled observer, loaded once.

        Nobody names an observer in a run file, so one that does not load costs a warning and not the run.
        """
        if self._observers is None:
            loaded: dict[str, PluginEntry] = {}
            for entry in self._entries:
                if entry.kind != "observer" or entry.status == "disabled":
                    continue
                try:
                    self.load_observer(entry)
                    loaded[entry.value] = entry
                except PluginError as error:
                    _log.warning("an observer is left out: %s", error)
            self._observers = Observers(self._manager, loaded)
        return self._observers

    def load_observer(self, entry: PluginEntry) -> None:
        """Import one observer.

        :raises PluginError: it is in conflict, incompatible or broken.
        """
        self._register(self.choose("observer", entry.name))

    def provenance(self, parts: Iterable[tuple[Kind, str]]) -> dict[str, dict[str, str]]:
        """Where each chosen part comes from: ``{"kind:name": {distribution, version, origin}}``."""
        chosen = [self.choose(kind, name) for kind, name in parts]
        return {
            f"{entry.kind}:{entry.name}": {
                "distribution": entry.distribution,
                "version": entry.version,
                "origin": entry.origin,
            }
            for entry in chosen
        }

    def _missing(self, kind: Kind, name: str) -> PluginError:
        names = self.names(kind)
        listed = f"installed: {', '.join(names)}" if names else "none is installed"
        return PluginError(f"no {kind} {show_value(name)} is installed ({listed})", hint=_advise(kind, name, names))

    def _load_descriptor(self, entry: PluginEntry) -> PartSpec:
        hook_name = KINDS[entry.kind].hook
        plugin = self._register(entry)
        others = [other for other in self._manager.get_plugins() if other is not plugin]
        hook = self._manager.subset_hook_caller(hook_name, others)
        with foreign_code(lambda failure: _broken(entry, f"{hook_name} failed: {failure}")):
            offered = [descriptor for result in hook() for descriptor in result]
        for descriptor in offered:
            _verify_descriptor(entry, descriptor)
        named = [descriptor for descriptor in offered if descriptor.name == entry.name]
        if len(named) == 1:
            return cast(PartSpec, named[0])
        names = ", ".join(repr(descriptor.name) for descriptor in offered) or "nothing"
        raise _broken(entry, f"its entry point is named {entry.name!r}, but {hook_name} offers {names}")

    def _register(self, entry: PluginEntry) -> Any:
        """Import and register an entry's module, once however many entries share it."""
        plugin = self._manager.get_plugin(entry.value)
        if plugin is not None:
            return plugin
        with foreign_code(lambda failure: _broken(entry, failure)):
            plugin = _import_plugin(entry)
            try:
                self._manager.register(plugin, name=entry.value)
                self._manager.check_pending()
                _verify_hooks(entry, plugin, self._promised_hooks(entry))
            except BaseException as error:
                if self._manager.get_plugin(entry.value) is plugin:
                    self._manager.unregister(plugin)
                if isinstance(error, (ValueError, pluggy.PluginValidationError)):
                    raise _broken(entry, str(error)) from error
                raise
        return plugin

    def _promised_hooks(self, entry: PluginEntry) -> frozenset[str]:
        """Hooks that something will call: those of the kinds under which the module has an entry point."""
        kinds = {other.kind for other in self._entries if other.value == entry.value}
        hooks = {KINDS[kind].hook for kind in PARTS if kind in kinds}
        return frozenset(hooks | (OBSERVER_HOOKS if "observer" in kinds else set()))


def _advise(kind: Kind, name: str, installed: Collection[str]) -> str:
    """What to do about a part that is missing. Only distributions of this project are named: whoever registers the name
    that a user mistyped would have it installed."""
    official: Mapping[str, str] = json.loads((files(__package__) / "official_parts.json").read_bytes()).get(kind, {})
    if name in official:
        return f"pip install {official[name]}"
    meant = suggest(name, {*installed, *official})
    close = [part for part in official if part not in installed and repr(part) in meant]
    install = f" pip install {official[close[0]]}" if close else ""
    return f"{meant}{install}" if meant else "`specforge plugins` lists what is installed; correct the name"


def _import_plugin(entry: PluginEntry) -> Any:
    module_name, _, attribute = entry.value.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, attribute) if attribute else module


def _verify_hooks(entry: PluginEntry, plugin: Any, promised: frozenset[str]) -> None:
    """Refuse a hook that would never be called: unmarked, or of a kind without an entry point."""
    for name in dir(plugin):
        if not name.startswith(_PREFIX) or not callable(getattr(plugin, name)):
            continue
        if not hasattr(getattr(plugin, name), f"{specs.PROJECT}_impl"):
            raise _broken(entry, f"{name} looks like a hook but is not marked with @hookimpl")
        if name not in promised:
            raise _broken(entry, f"{name} is implemented, but {entry.value} has no entry point in that hook's group")


def _verify_descriptor(entry: PluginEntry, descriptor: Any) -> None:
    hook_name, spec = KINDS[entry.kind].hook, SPECS[entry.kind]
    if not isinstance(descriptor, spec):
        raise _broken(entry, f"{hook_name} returned a {type(descriptor).__name__}, not a {spec.__name__}")
    if not (isinstance(descriptor.config, type) and issubclass(descriptor.config, spec.section)):
        raise _broken(entry, f"{descriptor.name!r}: config is not a subclass of {spec.section.__name__}")


def _conflict(entries: Sequence[PluginEntry]) -> PluginError:
    first, *rest = entries
    offers = " and ".join(entry.source for entry in entries)
    settle = " or ".join(f"--no-plugin {entry.distribution}:{entry.name}" for entry in [first, *rest])
    return PluginError(
        f"{first.kind} {first.name!r} is offered by {offers}", hint=f"pip uninstall one of them, or say {settle}"
    )


def _broken(entry: PluginEntry, problem: str) -> PluginError:
    return PluginError(
        f"{entry.kind} {entry.name!r} of {entry.source} is broken: {problem}",
        hint=f"reinstall or uninstall {entry.distribution}; `specforge plugins check {entry.name}` looks again",
    )
