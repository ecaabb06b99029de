# SPDX-License-Identifier: Apache-2.0
"""What each topology needs of the two wires, as a table. Topologies differ here and in where the halves run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from specforge_core.config.run_config import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class TopologyNeeds:
    """Default parts, the capabilities that any part must declare, and what the two halves do."""

    default_store: str
    default_channel: str
    store: tuple[str, ...] = ()
    channel: tuple[str, ...] = ()
    capture_half: str
    train_half: str


TOPOLOGIES: Mapping[Topology, TopologyNeeds] = {
    "offline": TopologyNeeds(
        default_store="file",
        default_channel="file",
        store=("cross_process", "durable"),
        channel=("durable", "replayable"),
        capture_half="first captures every prompt once and seals the channel",
        train_half="afterwards trains any number of epochs from the same features",
    ),
    "colocated": TopologyNeeds(
        default_store="memory",
        default_channel="memory",
        capture_half="a thread captures ahead of training, as far as the watermarks allow",
        train_half="a thread of the same process trains each sample once",
    ),
    "disaggregated": TopologyNeeds(
        default_store="file",
        default_channel="file",
        store=("cross_process",),
        channel=("cross_process",),
        capture_half="processes of their own capture ahead of training, as far as the watermarks allow",
        train_half="another process trains each sample once",
    ),
}
