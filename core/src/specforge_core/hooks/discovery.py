# SPDX-License-Identifier: Apache-2.0
"""What is installed, read from metadata alone: no plugin is imported here, nor is pydantic or pluggy.

A distribution offers parts through entry points, one group per kind. Listing reads entry points, versions, PEP 610
origins and requirements; ``hooks.manager`` imports what a run chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Literal

from importlib_metadata import EntryPoint, IDistribution, distributions
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from specforge_core.contracts.errors import PluginError
from specforge_core.hooks.kinds import KIND_OF_GROUP, KINDS, Kind

Status = Literal["ok", "disabled", "shadowed", "incompatible", "broken"]

CORE_DISTRIBUTION = "specforge-core"

_VALUE = re.compile(r"[\w.]+(:[\w.]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginEntry:
    """One entry point of one distribution, as its metadata describes it.

    :param value: the module (or ``module:object``) with the hook implementations.
    :param origin: ``editable PATH``, ``URL@COMMIT``, a file URL, or ``index`` (PEP 610).
    :param requires: the distribution's requirement on specforge-core, or "".
    :param detail: why ``status`` is not ``ok``; also where another copy of the distribution was passed over.
    """

    kind: Kind
    name: str
    value: str
    distribution: str
    version: str
    origin: str
    requires: str
    status: Status = "ok"
    detail: str = ""

    @property
    def source(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"

    def matches(self, selector: str) -> bool:
        """Whether ``--no-plugin SELECTOR`` means this entry.

        A selector is the entry's name, its distribution, ``DISTRIBUTION:NAME`` or ``KIND:NAME``.
        """
        owner, separator, name = selector.rpartition(":")
        if separator:
            return name == self.name and (owner == self.kind or canonicalize_name(owner) == self.distribution)
        return selector == self.name or canonicalize_name(selector) == self.distribution

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def list_entries(disabled: Collection[str] = ()) -> list[PluginEntry]:
    """Every entry point of every installed distribution, sorted by kind, name and distribution.

    :param disabled: selectors as :meth:`PluginEntry.matches` reads them.
    :raises PluginError: a selector that matches nothing installed.
    """
    core = core_version()
    found = [entry for distribution in _offering_distributions() for entry in _read_entries(distribution, core)]
    _check_selectors(disabled, found)
    found = [_disable(entry, disabled) for entry in found]
    found = [_mark_conflict(entry, found) for entry in found]
    return sorted(found, key=lambda e: (list(KINDS).index(e.kind), e.name, e.distribution, e.value))


def _offering_distributions() -> Iterator[IDistribution]:
    """One distribution per name, of those that offer entry points in our groups.

    ``entry_points(group=…)`` keeps the first distribution of a name, so that a stale ``.egg-info`` on the path hides
    the real one. Here a ``.dist-info`` is preferred, and only then the order of ``sys.path`` decides.
    """
    seen: set[str] = set()
    for distribution in distributions():
        if "specforge." not in (distribution.read_text("entry_points.txt") or ""):
            continue
        name = _identify(distribution)[0]
        if name not in seen:
            seen.add(name)
            yield next(iter(_copies(name)), distribution)


def _copies(name: str) -> list[IDistribution]:
    """Every copy of a distribution on the path, the one to use first."""
    return sorted(distributions(name=name), key=lambda copy: copy.read_text("METADATA") is None)


def _identify(distribution: IDistribution) -> tuple[str, str, str]:
    """Name, version and what is wrong with them; metadata may lack both, and then the directory must name it."""
    try:
        return canonicalize_name(distribution.metadata["Name"]), distribution.version or "unknown", ""
    except (FileNotFoundError, KeyError, TypeError):
        return f"unnamed in {distribution.locate_file('')}", "unknown", "its metadata has no name or no version"


def _passed_over(chosen: IDistribution, name: str) -> str:
    own = chosen.locate_file("")
    others = [copy for copy in _copies(name) if copy.locate_file("") != own]
    places = sorted({f"{copy.version} in {copy.locate_file('')}" for copy in others})
    return f"other copies not used: {', '.join(places)}" if places else ""


def _read_entries(distribution: IDistribution, core: str) -> list[PluginEntry]:
    points = [point for point in distribution.entry_points if point.group in KIND_OF_GROUP]
    if not points:
        return []
    name, version, defect = _identify(distribution)
    requirement, unmet = ("", "") if defect else _core_requirement(distribution, core)
    origin, passed_over = _describe_origin(distribution), _passed_over(distribution, name)
    entries = []
    for point in points:
        problem = defect or _find_malformation(point)
        status: Status = "broken" if problem else "incompatible" if unmet else "ok"
        entries.append(
            PluginEntry(
                kind=KIND_OF_GROUP[point.group],
                name=point.name,
                value=point.value,
                distribution=name,
                version=version,
                origin=origin,
                requires=requirement,
                status=status,
                detail=problem or unmet or passed_over,
            )
        )
    return entries


def _find_malformation(point: EntryPoint) -> str:
    """What is wrong with an entry point as far as it shows without importing it."""
    if not _VALUE.fullmatch(point.value):
        return f"entry point {point.name} = {point.value!r} is not a module"
    top_level = point.value.partition(":")[0].partition(".")[0]
    try:
        missing = find_spec(top_level) is None
    except (ImportError, ValueError):
        missing = True
    return f"there is no module named {top_level!r}" if missing else ""


def _core_requirement(distribution: IDistribution, installed: str) -> tuple[str, str]:
    """The requirement on specforge-core and, where it is not met, why."""
    for line in distribution.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if canonicalize_name(requirement.name) != CORE_DISTRIBUTION:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        text = f"{CORE_DISTRIBUTION}{requirement.specifier}"
        met = requirement.specifier.contains(installed, prereleases=True)
        return text, "" if met else f"requires {text}; {CORE_DISTRIBUTION} {installed} is installed"
    return "", ""


def core_version() -> str:
    """The installed version of this package.

    :raises PluginError: it runs from a source tree that was never installed.
    """
    for copy in _copies(CORE_DISTRIBUTION):
        return copy.version
    raise PluginError(f"{CORE_DISTRIBUTION} is not installed here", hint="pip install it, or `pip install -e core`")


def _describe_origin(distribution: IDistribution) -> str:
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = origin.get("url")
        editable = origin.get("dir_info", {}).get("editable", False)
        commit = origin.get("vcs_info", {}).get("commit_id")
    except (ValueError, AttributeError):  # a file that is not PEP 610 must not hide the plugin
        return "unknown (direct_url.json is malformed)"
    if url is None:
        return "index"
    if editable:
        return f"editable {url.removeprefix('file://')}"
    return f"{url}@{commit}" if commit else str(url)


def _check_selectors(selectors: Iterable[str], entries: Sequence[PluginEntry]) -> None:
    for selector in selectors:
        if any(entry.matches(selector) for entry in entries):
            continue
        known = {entry.name for entry in entries} | {entry.distribution for entry in entries}
        raise PluginError(
            f"no plugin named {selector!r} is installed, so it cannot be disabled",
            hint=suggest(selector, known) or "`specforge plugins` lists what is installed",
        )


def _disable(entry: PluginEntry, selectors: Collection[str]) -> PluginEntry:
    hits = [selector for selector in selectors if entry.matches(selector)]
    return replace(entry, status="disabled", detail=f"disabled as {hits[0]!r}") if hits else entry


def _mark_conflict(entry: PluginEntry, entries: Sequence[PluginEntry]) -> PluginEntry:
    if entry.status == "disabled":
        return entry
    rivals = [
        other
        for other in entries
        if (other.kind, other.name) == (entry.kind, entry.name) and other != entry and other.status != "disabled"
    ]
    if not rivals:
        return entry
    names = ", ".join(sorted(other.source for other in rivals))
    return replace(entry, status="shadowed", detail=f"also offered by {names}")


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` for the closest known word, or "" where none is close."""
    close = get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
