# SPDX-License-Identifier: Apache-2.0
"""Features in the memory of the run's machines: one object per tensor, from tensor memory to tensor memory.

The service has no transactions, keeps old bytes where a key is put twice and gives a removed object's memory to the
next one at once, whoever is reading. What makes a sample whole nevertheless:

* its keys hold a generation that nobody else draws, so what a key holds never changes;
* a small *index* object names the newest generation: what is replaced is found there and removed, and a ref whose
  objects are missing is told from it to be stale, gone or corrupt;
* ``get`` looks, after it has read, whether the sample's first object is still there. It is always removed first, so
  then nothing it read was removed while it read: not by a delete, a replacement, nor a master that was restarted.

Two *processes* that put one id at the same moment may leave the older bytes behind until their ref is deleted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from specforge_core.contracts import (
    LAST_HIDDEN_STATES,
    FeatureCorrupt,
    FeatureGone,
    FeatureSpec,
    FeatureStore,
    PartContext,
    Sample,
    SampleRef,
    StaleRef,
    StoreError,
    StoreFull,
    Usage,
    describe_sample,
)

from specforge_mooncake_store.access import AccessGuard
from specforge_mooncake_store.connection import (
    BAD_LENGTH,
    IN_PROGRESS,
    NO_SUCH_KEY,
    Connection,
    StoreHasNoRoom,
    Unreachable,
    small,
)
from specforge_mooncake_store.generations import Generations
from specforge_mooncake_store.holdings import Holdings
from specforge_mooncake_store.layout import UNREADABLE, IndexRecord, Namespace, digest, on_wire
from specforge_mooncake_store.removals import Removals

if TYPE_CHECKING:
    from torch import Tensor

    from specforge_mooncake_store.config import MooncakeStoreConfig

T = TypeVar("T")

_LOCKS = 64
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_REMOUNT_SECONDS = 2.0
_CAPTURE_AGAIN = "capture the sample again"


class MooncakeStore(FeatureStore):
    """Samples in the segments of a master's clients. Any number of processes may attach to one run's.

    ``usage`` counts what this process put and nobody has replaced or deleted; over all processes that is everything.
    """

    def __init__(self, config: MooncakeStoreConfig, context: PartContext) -> None:
        self._name = config.name
        self._deadline_seconds = config.deadline_seconds
        self._keys = Namespace(context.run_id, context.token)
        self._generations = Generations()
        self._putting = [threading.Lock() for _ in range(_LOCKS)]
        self._connection = Connection(config)
        self._removals = Removals(self._connection)
        self._holdings = Holdings(self._connection)
        self._access = AccessGuard(
            self._connection, key=self._keys.access_key, run_id=context.run_id, token=context.token
        )
        try:
            self._until_answered(self._access.attach, where=config.master)
        except BaseException:
            self._connection.close()
            raise

    def put(self, sample_id: str, sample: Sample) -> SampleRef:
        ref = describe_sample(sample_id, sample, store=self._name)
        tensors = [sample.features[spec.name].detach().to("cpu").contiguous() for spec in on_wire(ref)]
        self._removals.work()
        try:
            with self._lock_of(sample_id):
                return self._until_answered(lambda: self._put_once(ref, tensors), where=sample_id)
        except StoreHasNoRoom:
            largest = max(spec.nbytes for spec in ref.features)
            raise StoreFull(
                f"{ref.nbytes} bytes do not fit into the memory that the clients of {self._connection.master} bring",
                where=sample_id,
                hint="raise store.segment_bytes or lower the high watermark; a tensor must fit into one segment, "
                f"and the largest here has {largest} bytes",
            ) from None
        finally:
            self._removals.work()

    def _put_once(self, ref: SampleRef, tensors: list[Tensor]) -> SampleRef:
        """One attempt, under a generation of its own: a key whose put failed may be half written for minutes."""
        self._access.keep()
        index_key = self._keys.index_key(ref.sample_id)
        old = self._read_index(ref.sample_id)
        ref = replace(ref, generation=self._generations.draw(above=old.generation if old else 0))
        record = IndexRecord.of(ref)
        keys, index = self._keys.tensor_keys(ref.sample_id, record), small(record.encode())
        if old is None:
            self._put_whole([*keys, index_key], [*tensors, index])
        else:
            # The old objects go after the new ones have come: a put that fails keeps what there was.
            self._put_whole(keys, tensors)
            self._remove_later(self._keys.tensor_keys(ref.sample_id, old))
            self._replace_index(index_key, index, keys=keys)
        self._holdings.add(ref, key=(keys or [index_key])[0])
        return ref

    def _put_whole(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """All or none."""
        if not keys:
            return
        try:
            self._connection.put(keys, tensors)
        except (Unreachable, StoreHasNoRoom):
            self._remove_now_or_later(keys)
            raise

    def _replace_index(self, index_key: str, index: Tensor, *, keys: Sequence[str]) -> None:
        try:
            self._connection.remove([index_key])
            self._connection.put([index_key], [index])
        except (Unreachable, StoreHasNoRoom):
            self._remove_now_or_later(keys)
            raise

    def _remove_now_or_later(self, keys: Sequence[str]) -> None:
        try:
            self._connection.remove(keys)
        except Unreachable:
            self._remove_later(keys)

    def _remove_later(self, keys: Sequence[str]) -> None:
        self._removals.add(lambda: self._connection.remove(keys))

    def get(self, ref: SampleRef) -> Sample:
        return self._until_answered(lambda: self._get_once(ref), where=ref.sample_id)

    def _get_once(self, ref: SampleRef) -> Sample:
        features = _empty_tensors(ref)
        record = IndexRecord.of(ref)
        keys = self._keys.tensor_keys(ref.sample_id, record)
        specs = on_wire(ref)
        counts = self._connection.get_into(keys, [features[spec.name] for spec in specs]) if keys else []
        whole = counts == [spec.nbytes for spec in specs]
        if keys and not (whole and self._connection.exist(keys[:1])[0]):
            raise self._missing(ref, specs, counts)
        if not keys and self._read_index(ref.sample_id) != record:
            raise self._missing(ref, specs, counts)
        norm = next((spec.norm for spec in ref.features if spec.name == LAST_HIDDEN_STATES), None)
        return Sample(ref.prompt_id, ref.epoch, features, norm)

    def _missing(self, ref: SampleRef, specs: Sequence[FeatureSpec], counts: Sequence[int]) -> StoreError:
        """Why a ref's objects are not there, whole.

        :raises Unreachable: it is not known, and worth asking again.
        """
        strange = [n for n in counts if n < 0 and n not in (NO_SUCH_KEY, BAD_LENGTH)]
        if strange and NO_SUCH_KEY not in counts:
            raise Unreachable("get", strange[0])
        index = self._read_index(ref.sample_id)
        if index is not None and index.generation > ref.generation:
            return StaleRef(f"generation {ref.generation} was replaced by {index.generation}", where=ref.sample_id)
        if index is not None and index.generation == ref.generation and index.digest != digest(ref):
            return FeatureCorrupt("the stored tensors are not what the ref describes", where=ref.sample_id)
        for spec, count in zip(specs, counts, strict=True):
            if count == BAD_LENGTH or 0 <= count != spec.nbytes:
                found = f"{count} bytes" if count >= 0 else "more"
                text = f"{found} of {spec.name} where {spec.nbytes} belong"
                return FeatureCorrupt(text, where=ref.sample_id, hint=_CAPTURE_AGAIN)
        self._access.doubt()
        self.delete(ref)  # what is left of it where another part went with its process
        text = "its features were deleted, never put here, or went with the process or master that held them"
        return FeatureGone(text, where=ref.sample_id, hint=_CAPTURE_AGAIN)

    def delete(self, ref: SampleRef) -> None:
        """As the contract says; where the master does not answer, the removal is kept and tried again later."""
        self._generations.saw(ref.generation)
        self._holdings.drop(ref)
        self._removals.add(lambda: self._remove_sample(ref))
        self._removals.work()

    def _remove_sample(self, ref: SampleRef) -> None:
        """A ref's tensors and, if it is the newest generation, the index: with it goes the sample's last trace."""
        keys = self._keys.tensor_keys(ref.sample_id, IndexRecord.of(ref))
        with self._lock_of(ref.sample_id):
            index = self._read_index(ref.sample_id)
            if index is not None and index.generation == ref.generation:
                keys.append(self._keys.index_key(ref.sample_id))
            self._connection.remove(keys)

    def usage(self) -> Usage:
        return self._holdings.count()

    def close(self) -> None:
        if not self._connection.closed:
            self._removals.work()
            self._connection.close()

    def _read_index(self, sample_id: str) -> IndexRecord | None:
        """None: nobody has put the sample, or it is being put; for minutes, by a process that died putting it."""
        try:
            content = self._connection.read_small(self._keys.index_key(sample_id))
        except Unreachable as error:
            if error.code != IN_PROGRESS:
                raise
            return None
        return None if content is None else IndexRecord.decode(content) or UNREADABLE

    def _lock_of(self, sample_id: str) -> threading.Lock:
        return self._putting[hash(sample_id) % _LOCKS]

    def _until_answered(self, attempt: Callable[[], T], *, where: str) -> T:
        """Try again what the master or a peer did not answer, until the deadline.

        :raises StoreError: it has passed. No attempt outlasts it by more than the library's own limits, some 5 s.
        """
        begin = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return attempt()
            except Unreachable as error:
                self._access.doubt()
                if time.monotonic() + pause > begin + self._deadline_seconds:
                    raise StoreError(
                        f"no answer within {self._deadline_seconds:g} s: {error}",
                        where=f"{where}, mooncake master {self._connection.master}",
                        hint="see whether the master and the processes that bring memory are up and reachable",
                    ) from error
            except StoreHasNoRoom:
                # A master that was restarted has no room until it knows the segments again.
                known = _REMOUNT_SECONDS if self._connection.healthy else self._deadline_seconds
                if time.monotonic() + pause > begin + min(known, self._deadline_seconds):
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _empty_tensors(ref: SampleRef) -> dict[str, Tensor]:
    """Memory for what a ref describes, which the system gives only as far as it is filled.

    :raises FeatureCorrupt: no memory is that large: whoever wrote the ref made it up.
    """
    try:
        return {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in ref.features}
    except RuntimeError as error:
        text = f"the ref describes {ref.nbytes} bytes, more than there is memory"
        raise FeatureCorrupt(text, where=ref.sample_id, hint=_CAPTURE_AGAIN) from error
