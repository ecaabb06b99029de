# SPDX-License-Identifier: Apache-2.0
"""The ``store`` section of a run file that says ``name: mooncake``. ``specforge plan`` reads it: nothing heavy here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, field_validator
from specforge_core import FeatureStoreConfig

MIN_SEGMENT_BYTES = 16 << 20


class MooncakeStoreConfig(FeatureStoreConfig):
    """Features in the memory that this master's clients bring."""

    master: str = Field(
        pattern=r"^[\w.-]+:\d{1,5}$",
        description="HOST:PORT of the mooncake master; `specforge services mooncake` starts one",
    )
    segment_bytes: int = Field(
        1 << 30,
        ge=0,
        description="memory that each process brings, at least 16 MiB; what lies in it goes with the process. "
        "0: this process brings none",
    )
    host: str | None = Field(
        None, description="this machine's address for the others; default: the one that reaches the master"
    )
    protocol: Literal["tcp", "rdma"] = "tcp"
    rdma_devices: str = Field("", description="comma-separated; default: those that the library finds")
    deadline_seconds: float = Field(
        30.0, gt=0, description="how long a master or peer that does not answer is asked again; above its client_ttl"
    )

    def widens_trust(self) -> Mapping[str, str]:
        asked = {"master": f"connect to {self.master}"}
        if self.host is not None:
            asked["host"] = f"listen on {self.host}"
        return asked

    @field_validator("segment_bytes")
    @classmethod
    def _none_or_enough(cls, value: int) -> int:
        if 0 < value < MIN_SEGMENT_BYTES:
            raise ValueError(f"a segment has at least {MIN_SEGMENT_BYTES} bytes; 0 brings none")
        return value
