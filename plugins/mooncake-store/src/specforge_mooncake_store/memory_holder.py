# SPDX-License-Identifier: Apache-2.0
"""A process that brings memory to a local master and listens on loopback only: for ``service``, which starts it.

``python -m specforge_mooncake_store.memory_holder MASTER BYTES SOCKET``; it ends when the socket's other end closes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from specforge_core.contracts import StoreError

from specforge_mooncake_store.config import MooncakeStoreConfig
from specforge_mooncake_store.loopback import answer_binds, report_binds

_STOP_SECONDS = 10.0  # closing a client takes a second or two


class MemoryHolder:
    """The process, seen from the one that starts it."""

    def __init__(self, master: str, memory: int, *, prepare: Callable[[], None]) -> None:
        """Returns when the memory is there.

        :param prepare: what the process does first.
        :raises StoreError: the process cannot be kept on loopback, or does not reach the master.
        """
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, master, str(memory), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=prepare,
            )
        _, listeners, _, _ = socket.recv_fds(self._control, 1, 1)
        if listeners:
            threading.Thread(target=answer_binds, args=listeners, daemon=True).start()
        if not listeners or self._control.recv(1) != b"r":
            self.stop()
            raise StoreError(
                "memory for the master cannot be brought on loopback alone; see what was said above",
                where="service mooncake",
                hint="Linux 5.5 or later allows it, if no sandbox forbids seccomp; or start mooncake_master yourself",
            )

    def stop(self) -> None:
        """End it. Idempotent."""
        self._control.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def hold(master: str, memory: int, control: socket.socket) -> None:
    """Bring the memory, say so, and keep it until the other end of ``control`` closes."""
    report_binds(control)
    from specforge_mooncake_store.connection import Connection  # the library, and its threads: after the report

    config = MooncakeStoreConfig(name="mooncake", master=master, segment_bytes=memory, host="127.0.0.1")
    holder = Connection(config)
    control.send(b"r")
    control.recv(1)
    holder.close()


if __name__ == "__main__":
    try:
        hold(sys.argv[1], int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3])))
    except (OSError, StoreError) as failed:
        sys.exit(f"specforge services: {failed}")
