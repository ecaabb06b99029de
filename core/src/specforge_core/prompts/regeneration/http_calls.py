# SPDX-License-Identifier: Apache-2.0
"""HTTP calls of one thread: connections that stay open, a deadline over each call, replies of bounded size.

The standard library's client is enough: one thread per request in flight waits for one answer, and nothing is streamed.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from specforge_core.contracts import DataError
from specforge_core.contracts.files import MAX_JSON_BYTES, parse_json
from specforge_core.contracts.redaction import show_value

_READ_BYTES = 1 << 16
"""At once: most answers are read whole."""
_CONNECT_SECONDS = 10.0
"""For a connection: longer than any network takes, so that a machine that is down is found out early."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    :param prefix: the path that the API's names are appended to.
    """

    scheme: str
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """:raises DataError: it is none that can be called."""
        try:
            parts = urlsplit(text)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise DataError(
                f"{show_value(text)} is no address of a server",
                where="regenerate.servers",
                hint="write it as http://host:port/v1",
            )
        if parts.username or parts.password:
            raise DataError(
                "an address holds a password",
                where="regenerate.servers",
                hint="put the key into regenerate.api_key_file",
            )
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered.

    :param body: its JSON; None where it is none.
    :param retry_after: seconds that the server asks to be left alone.
    """

    status: int
    body: Any
    retry_after: float = 0.0


class CallFailed(Exception):
    """No reply came.

    :ivar sent: whether the server may have seen the request.
    """

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class HttpCalls:
    """Connections to several servers, for one thread; ``close`` may be called from another and ends its call."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._open: dict[Address, http.client.HTTPConnection] = {}

    def get(self, address: Address, path: str, *, seconds: float) -> Reply:
        return self._call(address, "GET", path, None, seconds)

    def post(self, address: Address, path: str, body: bytes, *, seconds: float) -> Reply:
        """:raises CallFailed: no reply in time, or none that is whole."""
        return self._call(address, "POST", path, body, seconds)

    def close(self) -> None:
        for connection in list(self._open.values()):
            _end(connection)

    def _call(self, address: Address, method: str, path: str, body: bytes | None, seconds: float) -> Reply:
        deadline = time.monotonic() + seconds
        kept = address in self._open
        try:
            return self._try(address, method, path, body, deadline)
        except _Stale:
            if not kept:
                raise CallFailed("closed the connection without a word", sent=True) from None
        return self._call(address, method, path, body, max(deadline - time.monotonic(), 0.001))

    def _try(self, address: Address, method: str, path: str, body: bytes | None, deadline: float) -> Reply:
        """:raises _Stale: the connection was closed before anything came."""
        sent = False
        try:
            connection = self._connection(address, deadline)
            sent = True
            headers = {**self._headers, **({"Content-Type": "application/json"} if body is not None else {})}
            connection.request(method, address.prefix + path, body, headers)
            _allow(connection, deadline)
            response = connection.getresponse()
            reply = _read(connection, response, deadline)
            if response.will_close:
                self._drop(address)
            return reply
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._drop(address)
            raise _Stale from None
        except TimeoutError:
            self._drop(address)
            raise CallFailed("did not answer in time", sent=sent) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._drop(address)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise CallFailed(reason, sent=sent) from error

    def _connection(self, address: Address, deadline: float) -> http.client.HTTPConnection:
        connection = self._open.get(address)
        if connection is None:
            seconds = min(_CONNECT_SECONDS, max(deadline - time.monotonic(), 0.001))
            connection = (
                http.client.HTTPSConnection(
                    address.host, address.port, timeout=seconds, context=ssl.create_default_context()
                )
                if address.scheme == "https"
                else http.client.HTTPConnection(address.host, address.port, timeout=seconds)
            )
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open[address] = connection
        _allow(connection, deadline)
        return connection

    def _drop(self, address: Address) -> None:
        connection = self._open.pop(address, None)
        if connection is not None:
            connection.close()


class _Stale(Exception):
    """A connection that the server closed meanwhile; a new one may do."""


def _allow(connection: http.client.HTTPConnection, deadline: float) -> None:
    """What is left of the time, for the socket's next wait. :raises TimeoutError: nothing is."""
    rest = deadline - time.monotonic()
    if rest <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(rest)


def _read(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> Reply:
    pieces, size = [], 0
    while piece := response.read1(_READ_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_JSON_BYTES:
            raise ValueError("a reply that is too long")
        _allow(connection, deadline)
    short = bool(response.length)
    response.close()  # read to its end by pieces, it does not know that it was
    if short:
        raise ConnectionAbortedError(None, "a reply that ends too early")
    body = None
    with suppress(ValueError):
        body = parse_json(b"".join(pieces))
    retry_after = 0.0
    with suppress(ValueError):
        retry_after = float(response.headers.get("Retry-After", "0"))
    return Reply(response.status, body, retry_after)


def _end(connection: http.client.HTTPConnection) -> None:
    with suppress(OSError, AttributeError):
        connection.sock.shutdown(socket.SHUT_RDWR)
