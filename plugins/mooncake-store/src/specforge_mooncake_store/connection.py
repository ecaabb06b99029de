# SPDX-License-Identifier: Apache-2.0
"""One process's client of the service: raw objects in, raw objects out, and the library's answers made exact.

The library answers with numbers, crashes the process when it is used after ``close`` and may be asked for a missing
master for long. Here every answer is a value or one of two exceptions, and a closed connection refuses.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from specforge_core.contracts import StoreError

from specforge_mooncake_store.registration import Registrations
from specforge_mooncake_store.vendor_environment import limit_waits

if TYPE_CHECKING:
    from torch import Tensor

    from specforge_mooncake_store.config import MooncakeStoreConfig

NO_ROOM = -200
BAD_LENGTH = -600
IN_PROGRESS = -703
NO_SUCH_KEY = -704
LEASE_EXPIRED = -707
SMALL_BYTES = 4096
"""The longest object that ``read_small`` reads."""

_LEFT = (0, NO_SUCH_KEY, IN_PROGRESS)  # what is being written by nobody any more the master discards by itself
_CLOSE_SECONDS = 10.0
_PAUSE_SECONDS = 0.5


class Unreachable(Exception):
    """A master or peer did not answer, or did not finish: worth asking again."""

    def __init__(self, what: str, code: int) -> None:
        expired = " (its lease expired meanwhile: start the master with a longer --default_kv_lease_ttl)"
        super().__init__(f"{what} ended with code {code}{expired if code == LEASE_EXPIRED else ''}")


class StoreHasNoRoom(Exception):
    """No segment has room for an object."""


class Connection:
    """A client with its segment. Safe to use from several threads."""

    def __init__(self, config: MooncakeStoreConfig) -> None:
        self.master = config.master
        host = config.host or _own_address(config.master)
        limit_waits(host)
        library = _import_library()
        self._client: Any = _set_up(library, config, host)
        self._registrations = Registrations(self._client) if config.protocol == "rdma" else None
        self._placement = library.ReplicateConfig()
        self._placement.with_hard_pin = True  # others are evicted silently when the segments are full
        if config.segment_bytes:
            self._placement.preferred_segment = self._client.get_hostname()  # written once, at the speed of memory
        self._idle = threading.Condition()
        self._calls = 0
        self._finalizer = weakref.finalize(self, self._client.close)  # also when the interpreter exits

    def put(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Store one object per contiguous CPU tensor. After an exception some may be there: the caller removes them.

        :raises StoreHasNoRoom: there was no room for all.
        :raises Unreachable: it is not known to have gone well. The keys must not be used again.
        """
        pointers, sizes = _memory(tensors)
        with self._calling(pointers, sizes) as client:
            codes = client.batch_put_from(list(keys), pointers, sizes, self._placement)
        if NO_ROOM in codes:
            raise StoreHasNoRoom
        _refuse("put", [code for code in codes if code])

    def get_into(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """Fill the tensors; bytes read for each key, or the library's negative code."""
        pointers, sizes = _memory(tensors)
        with self._calling(pointers, sizes) as client:
            return list(client.batch_get_into(list(keys), pointers, sizes))

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """:raises Unreachable: the master does not say."""
        with self._calling() as client:
            codes = client.batch_is_exist(list(keys))
        _refuse("exists", [code for code in codes if code < 0])
        return [code == 1 for code in codes]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects now, whether or not somebody holds a lease on them; those that are gone do not matter.

        The first key goes before all others: who reads and then still finds it has read all of them whole.

        :raises Unreachable: some may be left.
        """
        if not keys:
            return
        with self._calling() as client:
            codes = [client.remove(keys[0], True)]
            if len(keys) > 1 and codes[0] in _LEFT:
                codes += client.batch_remove(list(keys[1:]), True)
        _refuse("remove", [code for code in codes if code not in _LEFT])

    def read_small(self, key: str) -> bytes | None:
        """A small object's bytes, or None where there is no such object.

        :raises Unreachable: it cannot be said.
        """
        buffer = torch.empty(SMALL_BYTES, dtype=torch.uint8)
        [count] = self.get_into([key], [buffer])
        if count == NO_SUCH_KEY:
            return None
        _refuse("read", [count] if count < 0 else [])
        return bytes(buffer[:count].numpy())

    def put_small(self, key: str, content: bytes) -> None:
        """Store a small object; where the key is there already it keeps its bytes.

        :raises StoreHasNoRoom: there was no room.
        :raises Unreachable: it may not have been stored.
        """
        self.put([key], [small(content)])

    @property
    def healthy(self) -> bool:
        """Whether the master answered lately, and knows this client's segment."""
        with self._calling() as client:
            return bool(client.health_check() == 0)

    def close(self) -> None:
        """Give the segment back, with what lies in it. Idempotent; waits for calls that other threads are in."""
        with self._idle:
            client, self._client = self._client, None
            if client is None:
                return
            if self._idle.wait_for(lambda: not self._calls, _CLOSE_SECONDS):
                self._finalizer()

    def refuse_closed(self) -> None:
        """:raises StoreError: it was closed."""
        if self.closed:
            raise StoreError("this mooncake store was closed")

    @property
    def closed(self) -> bool:
        return self._client is None

    @contextmanager
    def _calling(self, pointers: Sequence[int] = (), sizes: Sequence[int] = ()) -> Iterator[Any]:
        """The client, which nobody closes meanwhile, with these pieces of memory registered where they must be."""
        with self._idle:
            self.refuse_closed()
            client = self._client
            self._calls += 1
        try:
            with self._registered(pointers, sizes):
                yield client
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def _registered(self, pointers: Sequence[int], sizes: Sequence[int]) -> Any:
        if self._registrations is None or not pointers:
            return nullcontext()  # TCP reads and writes any memory
        return self._registrations.hold(list(zip(pointers, sizes, strict=True)))


def small(content: bytes) -> Tensor:
    """Bytes as a tensor, to be put."""
    if len(content) > SMALL_BYTES:
        raise StoreError(f"{len(content)} bytes describe this sample, above {SMALL_BYTES}", where="store mooncake")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _memory(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]


def _refuse(what: str, codes: Sequence[int]) -> None:
    if codes:
        raise Unreachable(what, codes[0])


def _own_address(master: str) -> str:
    """This machine's address on the way to the master."""
    host, _, port = master.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise StoreError(f"no way to {master}: {error}", where="store.master", hint="check store.master") from error


def _import_library() -> Any:
    try:
        import mooncake.store
    except ImportError as error:
        raise StoreError(
            f"mooncake cannot be imported: {error}",
            where="store mooncake",
            hint="pip install 'specforge-mooncake-store[cpu]' (or [cuda]), and the system libraries that it needs: "
            "apt-get install libibverbs1 libnuma1 libcurl4",
        ) from error
    return mooncake.store


def _set_up(library: Any, config: MooncakeStoreConfig, host: str) -> Any:
    """:raises StoreError: the master was not reached within the deadline."""
    end = time.monotonic() + config.deadline_seconds
    while True:
        client = library.MooncakeDistributedStore()
        code = client.setup(
            host, "P2PHANDSHAKE", config.segment_bytes, 0, config.protocol, config.rdma_devices, config.master
        )
        if code == 0:
            return client
        if time.monotonic() + _PAUSE_SECONDS > end:
            raise StoreError(
                f"no mooncake master answers at {config.master}, or it does not take this client (code {code})",
                where="store.master",
                hint="start one with `specforge services mooncake`, or look at its log",
            )
        time.sleep(_PAUSE_SECONDS)
