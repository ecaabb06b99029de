# SPDX-License-Identifier: Apache-2.0
"""The library's client: made, shared by this process's stores, closed when the last of them is.

One client per process and section means one segment, whoever else opens a store of the same section. It also spares
waiting: closing a client takes a second or two, in which the library lets no other Python thread run.
"""

from __future__ import annotations

import atexit
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specforge_core.contracts import StoreError

from specforge_mooncake_store.registration import Registrations
from specforge_mooncake_store.vendor_environment import limit_waits

if TYPE_CHECKING:
    from specforge_mooncake_store.config import MooncakeStoreConfig

CLOSED = "this mooncake store was closed"

_PAUSE_SECONDS = 0.5
_CLOSE_SECONDS = 10.0
_LEAVE_SECONDS = 0.05  # daemon threads see the refusal before the interpreter ends: inside torch they would abort it


class Client:
    """A client of the library, and how it places objects and registers memory.

    :param registrations: None where any memory may be transferred.
    """

    def __init__(self, library: Any, placement: Any, registrations: Registrations | None) -> None:
        self.placement = placement
        self.registrations = registrations
        self._library = library
        self._idle = threading.Condition()
        self._calls = 0
        self._closed = False

    @contextmanager
    def calling(self) -> Iterator[Any]:
        """The library's client, which is not closed inside the block: to use it afterwards would end the process.

        :raises StoreError: it was closed.
        """
        with self._idle:
            if self._closed:
                raise StoreError(CLOSED)
            self._calls += 1
        try:
            yield self._library
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Refuse new calls, wait for those going on (which are bounded), and close."""
        with self._idle:
            self._closed = True
            idle = self._idle.wait_for(lambda: not self._calls, _CLOSE_SECONDS)
        if idle:
            time.sleep(_LEAVE_SECONDS)
            self._library.close()


_lock = threading.RLock()  # a store that is collected while this is held releases its client there and then
_shared: dict[MooncakeStoreConfig, Client] = {}
_users: dict[MooncakeStoreConfig, int] = {}


def acquire(config: MooncakeStoreConfig) -> Client:
    """This process's client for the section; each ``acquire`` wants one ``release``.

    :raises StoreError: the library is not installed, or no master was reached within the deadline.
    """
    with _lock:
        if config not in _shared:
            _shared[config] = _open(config)
            _users[config] = 0
        _users[config] += 1
        return _shared[config]


def release(config: MooncakeStoreConfig) -> None:
    """Close the client, and give its segment back with what lies in it, where nobody else uses it."""
    with _lock:
        _users[config] -= 1
        if not _users[config]:
            _shared.pop(config).close()


@atexit.register
def _close_all() -> None:
    """Stores that were not closed: the library's own threads must end before the interpreter does."""
    with _lock:
        while _shared:
            _shared.popitem()[1].close()


def _open(config: MooncakeStoreConfig) -> Client:
    host = config.host or _own_address(config.master)
    limit_waits(host)
    module = _import_library()
    library = _set_up(module, config, host)
    placement = module.ReplicateConfig()
    placement.with_hard_pin = True  # others are evicted silently when the segments are full
    if config.segment_bytes:
        placement.preferred_segment = library.get_hostname()  # written at the speed of memory, sent once
    return Client(library, placement, Registrations(library) if config.protocol == "rdma" else None)


def _own_address(master: str) -> str:
    """This machine's address on the way to the master."""
    host, _, port = master.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, OverflowError) as error:
        raise StoreError(f"no way to {master}: {error}", where="store.master", hint="check store.master") from error


def _import_library() -> Any:
    try:
        import mooncake.store  # type: ignore[import-untyped]
    except ImportError as error:
        raise StoreError(
            f"mooncake cannot be imported: {error}",
            where="store mooncake",
            hint="pip install 'specforge-mooncake-store[cpu]' (or [cuda]), and the system libraries that it needs: "
            "apt-get install libibverbs1 libnuma1 libcurl4",
        ) from error
    return mooncake.store


def _set_up(module: Any, config: MooncakeStoreConfig, host: str) -> Any:
    """:raises StoreError: the master was not reached within the deadline."""
    end = time.monotonic() + config.deadline_seconds
    while True:
        library = module.MooncakeDistributedStore()
        code = library.setup(
            host, "P2PHANDSHAKE", config.segment_bytes, 0, config.protocol, config.rdma_devices, config.master
        )
        if code == 0:
            return library
        if time.monotonic() + _PAUSE_SECONDS > end:
            raise StoreError(
                f"no mooncake master answers at {config.master}, or it does not take this client (code {code})",
                where="store.master",
                hint="start one with `specforge services mooncake`, or look at its log",
            )
        time.sleep(_PAUSE_SECONDS)
