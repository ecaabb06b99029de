# SPDX-License-Identifier: Apache-2.0
"""Raw objects in, raw objects out, and the library's answers made exact.

The library answers with numbers; here every answer is a value or one of two exceptions. One connection belongs to one
store; the client under it may be shared (``client``).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from specforge_core.contracts import StoreError

from specforge_mooncake_store.client import CLOSED, Client, acquire, release

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

_GONE = (0, NO_SUCH_KEY, IN_PROGRESS)  # what nobody goes on writing the master discards by itself


class Unreachable(Exception):
    """A master or peer did not answer, or did not finish: worth asking again."""

    def __init__(self, what: str, code: int) -> None:
        self.code = code
        expired = " (its lease expired meanwhile: start the master with a longer --default_kv_lease_ttl)"
        super().__init__(f"{what} ended with code {code}{expired if code == LEASE_EXPIRED else ''}")


class StoreHasNoRoom(Exception):
    """No segment has room for an object."""


class Connection:
    """One store's use of the service. Safe to use from several threads; refuses once it was closed."""

    def __init__(self, config: MooncakeStoreConfig) -> None:
        self.master = config.master
        self._client: Client | None = acquire(config)
        self._release = weakref.finalize(self, release, config)
        self._release.atexit = False  # at exit the clients themselves are closed

    def put(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Store one object per contiguous CPU tensor. After an exception some may be there: the caller removes them.

        :raises StoreHasNoRoom: there was no room for all.
        :raises Unreachable: it is not known to have gone well. The keys must not be used again.
        """
        client = self._open_client()
        pointers, sizes = _memory(tensors)
        with client.calling() as library, _registered(client, pointers, sizes):
            codes = library.batch_put_from(list(keys), pointers, sizes, client.placement)
        if NO_ROOM in codes:
            raise StoreHasNoRoom
        _refuse("put", [code for code in codes if code])

    def get_into(self, keys: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """Fill the tensors; bytes read for each key, or the library's negative code."""
        client = self._open_client()
        pointers, sizes = _memory(tensors)
        with client.calling() as library, _registered(client, pointers, sizes):
            return list(library.batch_get_into(list(keys), pointers, sizes))

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """:raises Unreachable: the master does not say."""
        with self._open_client().calling() as library:
            codes = library.batch_is_exist(list(keys))
        _refuse("exist", [code for code in codes if code < 0])
        return [code == 1 for code in codes]

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects now, whether or not somebody holds a lease on them; those that are gone do not matter.

        The first key goes before all others: who reads and then still finds it has read all of them whole.

        :raises Unreachable: some may be left.
        """
        if not keys:
            return
        with self._open_client().calling() as library:
            codes = [library.remove(keys[0], True)]
            if len(keys) > 1 and codes[0] in _GONE:
                codes += library.batch_remove(list(keys[1:]), True)
        _refuse("remove", [code for code in codes if code not in _GONE])

    def read_small(self, key: str) -> bytes | None:
        """A small object's bytes, or None where there is no such object; none of it where it is not small.

        :raises Unreachable: it cannot be said.
        """
        buffer = torch.empty(SMALL_BYTES, dtype=torch.uint8)
        [count] = self.get_into([key], [buffer])
        if count == NO_SUCH_KEY:
            return None
        if count == BAD_LENGTH:
            return b""  # no store wrote it
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
        """Whether the master answered lately."""
        with self._open_client().calling() as library:
            return bool(library.health_check() == 0)

    @property
    def closed(self) -> bool:
        return self._client is None

    def close(self) -> None:
        """Give the client back; with the last of a process go its segment and what lies in it. Idempotent."""
        self._client = None
        self._release()

    def _open_client(self) -> Client:
        client = self._client
        if client is None:
            raise StoreError(CLOSED)
        return client


def small(content: bytes) -> Tensor:
    """Bytes as a tensor, to be put."""
    if len(content) > SMALL_BYTES:
        raise StoreError(f"{len(content)} bytes describe this sample, above {SMALL_BYTES}", where="store mooncake")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _memory(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return [tensor.data_ptr() for tensor in tensors], [tensor.nbytes for tensor in tensors]


def _registered(client: Client, pointers: Sequence[int], sizes: Sequence[int]) -> AbstractContextManager[None]:
    if client.registrations is None:
        return nullcontext()
    return client.registrations.hold(list(zip(pointers, sizes, strict=True)))


def _refuse(what: str, codes: Sequence[int]) -> None:
    if codes:
        raise Unreachable(what, codes[0])
