# SPDX-License-Identifier: Apache-2.0
"""The wires of a run: what joins its two halves, opened once per process, and the trust put into what they carry."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from specforge_core.config.plan import Plan
from specforge_core.contracts import (
    AccessDenied,
    DataError,
    FeatureStore,
    PartContext,
    RefChannel,
    SampleRef,
    Split,
    check_signature,
    held_out_sample_id,
    sign,
)
from specforge_core.features.contents import VouchedStore
from specforge_core.features.file_channel import FileChannel
from specforge_core.features.file_store import FileStore
from specforge_core.features.identity import file_name_problem
from specforge_core.hooks.builtin import FileChannelConfig, FileStoreConfig
from specforge_core.hooks.descriptors import resolve
from specforge_core.loading.trusted_refs import TrustedRefs
from specforge_core.run.directory import RunDirectory
from specforge_core.run.token import read_token

_NO_SECRET = "no secret: this only tells what belongs together"


@dataclass(frozen=True, slots=True)
class Wires:
    """Where tensors and where metadata go."""

    store: FeatureStore
    channel: RefChannel


class RunWires:
    """The run's own wires, and files beside the run for held-out features, which are captured once and kept.

    :param fingerprint: of what both halves must agree on about a split: target, captured features and prompts.
    """

    def __init__(self, plan: Plan, directory: RunDirectory, *, fingerprint: Callable[[Split], str]) -> None:
        self._plan = plan
        self._directory = directory
        self._fingerprint = fingerprint
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
        """The ref, signed for this run; without a token, marked as this run's, so that what another one left on the
        same channel is not taken for ours."""
        return sign(ref, token=self.token or _NO_SECRET, run_id=self._belongs_to(ref))

    def check(self, ref: SampleRef) -> None:
        """
        :raises AccessDenied: nobody with this run's token signed the ref for this run.
        :raises DataError: there is no token, and the ref was published for something else, or is none of ours at all.
        """
        try:
            check_signature(ref, token=self.token or _NO_SECRET, run_id=self._belongs_to(ref))
        except AccessDenied as error:
            if self.token is not None:
                raise
            raise DataError(
                "this ref was published for another run, or for another target, set of captured features or prompts",
                where=error.where,
                hint="let each run have a run.directory and a run.id (or channel.path) of its own; "
                "where an earlier attempt left it, remove what that left",
            ) from error
        problem = file_name_problem(ref.sample_id)
        if problem:
            raise DataError(
                f"no sample has the id {ref.sample_id[:80]!r}: {problem}", where=ref.origin, hint="remove that ref"
            )

    @cached_property
    def trusted(self) -> TrustedRefs:
        """What may be used of the refs that come over the wires."""
        return TrustedRefs(self.check)

    def _belongs_to(self, ref: SampleRef) -> str:
        """Offline features belong to no run: whoever captures the same shares them."""
        held_out = self._plan.config.data.eval and ref.sample_id == held_out_sample_id(ref.prompt_id)
        split: Split = "eval" if held_out else "train"
        run_id = "" if self._plan.feature_reuse else self._plan.run_id
        return f"{run_id} {self._fingerprint(split)}"

    def _open(self, split: Split) -> Wires:
        plan = self._plan
        context = PartContext(run_id=plan.run_id, directory=self._directory.split(split), token=self.token)
        if split == "eval":
            files = FileStoreConfig(name="file"), FileChannelConfig(name="file")
            return Wires(self._vouched(FileStore(files[0], context)), FileChannel(files[1], context))
        store: FeatureStore = resolve(plan.feature_store.factory)(plan.store_section, context)
        channel: RefChannel = resolve(plan.ref_channel.factory)(plan.channel_section, context)
        return Wires(self._vouched(store), channel)

    def _vouched(self, store: FeatureStore) -> FeatureStore:
        """With a token, a store whose bytes are signed with its refs."""
        return store if self.token is None else VouchedStore(store)

    def close(self) -> None:
        for wires in self._opened.values():
            wires.store.close()


def process_name() -> str:
    """A name that no other process of the run has, not even one that had this process's number before."""
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname()).strip("-") or "host"
    return f"{host[:40]}-{os.getpid()}-{os.urandom(3).hex()}"
