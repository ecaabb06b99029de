# SPDX-License-Identifier: Apache-2.0
"""The wires of a run: what joins its two halves, opened once per process, and the trust put into what they carry."""

from __future__ import annotations

import os
import re
import socket
import threading
from dataclasses import dataclass
from functools import cached_property

from specforge_core.config.plan import Plan
from specforge_core.contracts import (
    FeatureStore,
    PartContext,
    RefChannel,
    SampleRef,
    Split,
    check_signature,
    sign,
)
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_store import FileStore
from specforge_core.hooks.builtin import FileChannelConfig, FileStoreConfig
from specforge_core.hooks.descriptors import resolve
from specforge_core.run.directory import RunDirectory
from specforge_core.run.token import read_token


@dataclass(frozen=True, slots=True)
class Wires:
    """Where tensors and where metadata go."""

    store: FeatureStore
    channel: RefChannel


class RunWires:
    """The run's own wires, and files beside the run for held-out features, which are captured once and kept."""

    def __init__(self, plan: Plan, directory: RunDirectory) -> None:
        self._plan = plan
        self._directory = directory
        self._opened: dict[Split, Wires] = {}
        self._opening = threading.Lock()

    @cached_property
    def token(self) -> str | None:
        return read_token(self._plan.config.run)

    def __getitem__(self, split: Split) -> Wires:
        """The wires of a split.

        Both halves get the same ones, also when two threads ask at once: a channel of each half's own would leave
        the reader waiting for what the other channel holds.
        """
        with self._opening:
            if split not in self._opened:
                self._opened[split] = self._open(split)
            return self._opened[split]

    def sign(self, ref: SampleRef) -> SampleRef:
        return sign(ref, token=self.token, run_id=self._plan.run_id)

    def check(self, ref: SampleRef) -> None:
        """:raises AccessDenied: nobody with this run's token signed the ref."""
        check_signature(ref, token=self.token, run_id=self._plan.run_id)

    def _open(self, split: Split) -> Wires:
        plan = self._plan
        context = PartContext(run_id=plan.run_id, directory=self._directory.split(split), token=self.token)
        if split == "eval":
            files = FileStoreConfig(name="file"), FileChannelConfig(name="file")
            return Wires(FileStore(files[0], context), FileChannel(files[1], context))
        store: FeatureStore = resolve(plan.feature_store.factory)(plan.store_section, context)
        channel: RefChannel = resolve(plan.ref_channel.factory)(plan.channel_section, context)
        return Wires(store, channel)

    def close(self) -> None:
        for wires in self._opened.values():
            wires.store.close()


def process_name() -> str:
    """A name that no other process of the run has, not even one that had this process's number before."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()).strip("-") or "host"
    return f"{host[:40]}-{os.getpid()}-{os.urandom(3).hex()}"
