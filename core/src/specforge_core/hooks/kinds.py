# SPDX-License-Identifier: Apache-2.0
"""The kinds of parts that plugins add, in one table: what each is called in metadata, hooks, run files and packages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["strategy", "target-engine", "feature-store", "ref-channel", "observer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KindEntry:
    """How a kind is called in each place.

    :param group: of entry points.
    :param hook: that returns the descriptors; empty: such plugins implement other hooks.
    :param section: of the run file, whose ``name`` chooses the part; empty: a run chooses none.
    :param distribution: how ``specforge plugins new`` names one of them.
    """

    group: str
    hook: str = ""
    section: str = ""
    distribution: str = ""


KINDS: Mapping[Kind, KindEntry] = {
    "strategy": KindEntry(
        group="specforge.strategies",
        hook="specforge_strategies",
        section="strategy",
        distribution="specforge-{}",
    ),
    "target-engine": KindEntry(
        group="specforge.target_engines",
        hook="specforge_target_engines",
        section="target",
        distribution="specforge-{}-target",
    ),
    "feature-store": KindEntry(
        group="specforge.feature_stores",
        hook="specforge_feature_stores",
        section="store",
        distribution="specforge-{}-store",
    ),
    "ref-channel": KindEntry(
        group="specforge.ref_channels",
        hook="specforge_ref_channels",
        section="channel",
        distribution="specforge-{}-channel",
    ),
    "observer": KindEntry(group="specforge.observers"),
}

PARTS: tuple[Kind, ...] = tuple(kind for kind, entry in KINDS.items() if entry.section)
"""The kinds that make a run, each chosen once."""

KIND_OF_GROUP: Mapping[str, Kind] = {entry.group: kind for kind, entry in KINDS.items()}
