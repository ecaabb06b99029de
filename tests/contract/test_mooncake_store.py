# SPDX-License-Identifier: Apache-2.0
"""The feature store contract on a real Mooncake master, and the service's traps that the store must not fall into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mooncake_service import MooncakeService, bare_client, fresh_run, mooncake_service, require_mooncake
from specforge_core.contracts import FeatureCorrupt, FeatureGone, Sample, SampleRef, StaleRef, StoreError, StoreFull
from specforge_core.testing.feature_store_suite import FeatureStoreSuite
from specforge_core.testing.samples import assert_same, make_sample
from specforge_mooncake_store.connection import Connection

require_mooncake()
torch.set_num_threads(1)

SERVICE: MooncakeService


@pytest.fixture(scope="module", autouse=True)
def service() -> Iterator[MooncakeService]:
    global SERVICE
    # Closing a client takes seconds in which no Python runs; stores of one section share it while this one is open.
    with mooncake_service() as SERVICE, closing(SERVICE.store("kept open")):
        yield SERVICE


def large(mib: int, number: int = 0) -> Sample:
    values = torch.full((mib << 20,), number, dtype=torch.uint8)
    return Sample(f"large-{number}", 0, {"input_ids": torch.arange(4), "aux_hidden_states": values})


def tensor_key(ref: SampleRef, feature: str = "aux_hidden_states") -> str:
    [key] = [key for key in SERVICE.keys(f"/{ref.generation}.") if key.endswith(feature)]
    return key


class TestMooncakeStore(FeatureStoreSuite):
    limits_capacity = False
    _runs: ClassVar[dict[Path, str]] = {}

    def make_store(self, directory: Path, capacity_bytes: int | None = None, token: str | None = None) -> Any:
        return SERVICE.store(self._runs.setdefault(directory, fresh_run()), token=token)

    def corrupt(self, directory: Path, ref: SampleRef, keep_bytes: int) -> None:
        """Cut the largest tensor; an object has at least one byte, so 0 leaves one."""
        key = tensor_key(ref)
        nbytes = max(spec.nbytes for spec in ref.features)
        kept = min(max(keep_bytes, 1), nbytes - 1) if keep_bytes >= 0 else nbytes + keep_bytes
        replace_object(key, kept)


def replace_object(key: str, nbytes: int) -> None:
    with closing(Connection(SERVICE.section())) as connection:
        connection.remove([key])
        connection.put([key], [torch.zeros(nbytes, dtype=torch.uint8)])


@pytest.fixture
def run() -> str:
    return fresh_run()


@pytest.fixture
def store(run: str) -> Iterator[Any]:
    store = SERVICE.store(run)
    yield store
    store.close()
