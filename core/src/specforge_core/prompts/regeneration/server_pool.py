# SPDX-License-Identifier: Apache-2.0
"""Which of several servers gets the next request, which are down, and what each says of itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from specforge_core.contracts import TargetError
from specforge_core.prompts.regeneration.chat_api import read_error, read_models
from specforge_core.prompts.regeneration.http_calls import Address, CallFailed, HttpCalls, Reply

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 30.0
"""Between tries. A server that restarts takes a minute; asking twice in that minute costs nothing."""
_LOOK_SECONDS = 60.0
"""After which another caller looks at a server, if the one that looks does not come back."""
_TICK_SECONDS = 0.1
"""How late a server that came back is asked again."""
_HEALTH_SECONDS = 10.0
"""For a page that costs a server nothing to answer."""


class Server:
    """One server, as its callers know it; guarded by the lock of its pool."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.in_flight = 0
        self.asks_ids = True
        self.down = ""
        self.look_at = 0.0
        self.pause = FIRST_PAUSE_SECONDS


class ServerPool:
    """Which server gets the next request."""

    def __init__(self, addresses: Sequence[Address], *, model: str | None, timeout_seconds: float) -> None:
        self._model = model
        self.servers = [Server(address) for address in addresses]
        self._timeout = timeout_seconds
        self._changed = threading.Condition()
        self._seen_up = time.monotonic()
        self.closed = False

    def choose(self, *, rather_not: Server | None) -> tuple[Server, bool]:
        """The living server with the fewest requests, and whether it must first be looked at: it was down.

        :raises TargetError: there has been none for too long.
        """
        with self._changed:
            while not self.closed:
                now = time.monotonic()
                due = next((server for server in self.servers if server.down and server.look_at <= now), None)
                if due is not None:
                    due.look_at = now + _LOOK_SECONDS  # one looks, the others go on
                    due.in_flight += 1
                    return due, True
                living = [server for server in self.servers if not server.down]
                if living:
                    self._seen_up = now
                    chosen = min(living, key=lambda server: (server is rather_not, server.in_flight))
                    chosen.in_flight += 1
                    return chosen, False
                if now - self._seen_up > self._timeout:
                    reasons = "; ".join(f"{server.address}: {server.down}" for server in self.servers)
                    raise TargetError(
                        f"no server has answered for {self._timeout:.0f} s ({reasons})",
                        where="regenerate.servers",
                        hint="start the servers; the same command goes on where it was",
                    )
                self._changed.wait(_TICK_SECONDS)
        raise TargetError("the servers were closed", where="regenerate.servers")

    def give_back(self, server: Server) -> None:
        with self._changed:
            server.in_flight -= 1

    def mark_down(self, server: Server, reason: str) -> None:
        with self._changed:
            if not server.down:
                self._seen_up = time.monotonic()  # until now, as far as anybody knew
            server.down = reason
            server.look_at = time.monotonic() + server.pause
            server.pause = min(2 * server.pause, LONGEST_PAUSE_SECONDS)

    def mark_up(self, server: Server) -> None:
        with self._changed:
            server.down, server.pause = "", FIRST_PAUSE_SECONDS
            self._seen_up = time.monotonic()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def look_at(self, calls: HttpCalls, server: Server) -> dict[str, str] | None:
        """Whether a server is there: marked so, and what it says of itself.

        :raises TargetError: it is there, and refuses the key or has not the model.
        """
        try:
            reply = calls.get(server.address, "/models", seconds=_HEALTH_SECONDS)
        except CallFailed as failed:
            self.mark_down(server, str(failed))
            return None
        if reply.status in (401, 403, 404):
            raise refused(server, reply)
        if reply.status != 200:
            self.mark_down(server, f"status {reply.status}")
            return None
        self.mark_up(server)
        return {"model": self._find_model(server, read_models(reply.body)), "server": _find_version(calls, server)}

    def _find_model(self, server: Server, models: Sequence[str]) -> str:
        wanted = self._model
        if wanted is not None and (wanted in models or not models):
            return wanted
        if wanted is None and len(models) == 1:
            return models[0]
        has = ", ".join(models[:20]) or "none that it names"
        raise TargetError(
            f"{server.address} has these models: {has}",
            where="regenerate.model",
            hint="name the model that is to answer",
        )


def refused(server: Server, reply: Reply) -> TargetError:
    hints = {
        401: "put the servers' key into a file and name it in regenerate.api_key_file",
        403: "put the servers' key into a file and name it in regenerate.api_key_file",
        404: "an address ends where /models and /chat/completions are appended, most often in /v1",
    }
    said = read_error(reply.body)
    return TargetError(
        f"{server.address} refuses: status {reply.status} {said}".rstrip(),
        where="regenerate.servers",
        hint=hints.get(reply.status, "see the server's log"),
    )


def _find_version(calls: HttpCalls, server: Server) -> str:
    """The version that some servers tell at their root; "" where it is not told."""
    root = Address(server.address.scheme, server.address.host, server.address.port, "")
    try:
        body: Any = calls.get(root, "/version", seconds=_HEALTH_SECONDS).body
    except CallFailed:
        return ""
    version = body.get("version") if isinstance(body, dict) else None
    return version[:100] if isinstance(version, str) else ""
