# SPDX-License-Identifier: Apache-2.0
"""One connection to the server, which is made again when it is lost, and the server's errors in words.

Whatever is sent may have been carried out although its reply was lost, so it is sent again. Every operation of the
scripts is written so that this changes nothing.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, TypeVar

from redis import exceptions
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool, parse_url
from redis.retry import Retry
from specforge_core.contracts import AccessDenied, ChannelError, SpecForgeError
from specforge_core.contracts.redaction import HIDDEN, is_secret_name, redact_message

from specforge_redis_channel.config import RedisChannelConfig, without_secrets

ResultT = TypeVar("ResultT")

_COUNT = re.compile(rb"\d{1,19}")
_DAMAGED = re.compile(r"DAMAGED (\S+)")
"""What the scripts say of a key that they cannot read."""
_OTHER_DATA = "other data is under this run's keys: use another run.id, or remove them"

_FORMAT = "3"
_SAID_CHARACTERS = 500
"""Of a server's message: what answers may be no Redis at all, and say anything at any length."""
_CALL_SECONDS = 5.0
_OPEN_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_LOST = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)
_REFUSED = (exceptions.AuthenticationError, exceptions.NoPermissionError)
_HINTS: tuple[tuple[type[exceptions.ResponseError], str, str], ...] = (
    (
        exceptions.OutOfMemoryError,
        "",
        "its memory is full: raise maxmemory or lower the run's watermarks, and set maxmemory-policy noeviction",
    ),
    (exceptions.ReadOnlyError, "", "it is a replica: let channel.url name the primary"),
    (exceptions.ResponseError, "MISCONF", "it cannot write its own files: free space on its disk"),
    (exceptions.ResponseError, "WRONGTYPE", _OTHER_DATA),
    (exceptions.ResponseError, "not an integer", _OTHER_DATA),
    (exceptions.ResponseError, "user_script", _OTHER_DATA),
)


class Script:
    """A script that the server keeps under its digest."""

    def __init__(self, name: str) -> None:
        folder = files("specforge_redis_channel")
        self.text = (folder / "prelude.lua").read_bytes() + (folder / f"{name}.lua").read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


REFS, LEASES = Script("refs"), Script("leases")


class RedisConnection:
    """Not thread-safe, but for ``interrupt``.

    :param base: the run's name space in the server.
    :param proof: that this process has the run's token; "" where there is none.
    """

    def __init__(self, config: RedisChannelConfig, *, base: str, proof: str) -> None:
        self.base = base
        self.where = f"{without_secrets(config.url)} {base}"
        self.number = 0
        """How many connections were made; what was known of the server's state holds for one of them."""
        self._proof = proof
        self._lease_seconds = config.lease_seconds
        self._reconnect_seconds = config.reconnect_seconds
        self._since = 0.0
        self._interrupted = threading.Event()
        # Shorter than a lease: a call that outlasts a server's standstill must not judge by heartbeats that stood too.
        seconds = min(_CALL_SECONDS, config.lease_seconds / 2)
        try:
            options = parse_url(config.url) | {
                "protocol": 2,
                "decode_responses": False,
                "retry": Retry(NoBackoff(), 0),
                "socket_timeout": seconds,
                "socket_connect_timeout": seconds,
            }
            self._connection: Any = ConnectionPool(**options).make_connection()
            self._secrets = _secrets_of(options, proof)
        except (ValueError, TypeError, AttributeError, exceptions.RedisError) as error:
            raise ChannelError(
                f"channel.url has an option that the client does not take ({type(error).__name__})", where=self.where
            ) from None

    @property
    def settled(self) -> bool:
        """Connected for so long that whoever lives has shown it since; before, nobody may be taken for dead."""
        return time.monotonic() - self._since > self._lease_seconds

    def call(self, operation: Callable[[], ResultT], *, at_most: float | None = None) -> ResultT:
        """Carry out an operation, again on a new connection where one is lost.

        :param at_most: seconds to try for, if fewer than ``reconnect_seconds``.
        :raises ChannelError: the server stayed away for so long, or refuses.
        :raises AccessDenied: the server's password, or the run's token, is missing or wrong.
        """
        seconds = self._reconnect_seconds if self.number else min(_OPEN_SECONDS, self._reconnect_seconds)
        seconds = seconds if at_most is None else min(seconds, at_most)
        deadline = time.monotonic() + seconds
        pause = _FIRST_PAUSE
        while True:
            try:
                self._connect()
                return operation()
            except SpecForgeError:
                raise
            except _REFUSED as error:
                raise self._denied(error) from None
            except _LOST as error:
                self._connection.disconnect()
                self._raise_if_hopeless(error, seconds, deadline - time.monotonic())
            except exceptions.ResponseError as error:
                raise self._refused(error) from None
            except exceptions.RedisError as error:
                raise ChannelError(f"what answers is no Redis server: {self._told(error)}", where=self.where) from None
            self._interrupted.wait(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE)

    def execute(self, *command: str | bytes | int) -> Any:
        """Inside an operation: one command and its reply."""
        try:
            self._connection.send_command(*command)
            return self._connection.read_response()
        except exceptions.ResponseError:
            raise
        except BaseException:
            self._connection.disconnect()  # Ctrl-C, say: the reply must not be taken for the next command's
            raise

    def run(self, script: Script, *arguments: str | bytes | int) -> list[Any]:
        """Inside an operation: one of a script's operations, by name, and what it returns."""
        reply = self._evaluate(script, arguments)
        if reply[0] == b"lapsed":
            self._since = time.monotonic()  # this process, or the server, stood still
            reply = self._evaluate(script, arguments)
        return reply

    def _evaluate(self, script: Script, arguments: tuple[str | bytes | int, ...]) -> list[Any]:
        ttl = int(1000 * self._lease_seconds)
        rest = (1, self.base, arguments[0], ttl, int(self.settled), *arguments[1:])
        try:
            return self.execute("EVALSHA", script.digest, *rest)  # type: ignore[no-any-return]
        except exceptions.NoScriptError:
            return self.execute("EVAL", script.text, *rest)  # type: ignore[no-any-return]

    def interrupt(self) -> None:
        """Let a call that is waiting for the server give up, and every later one until ``resume``."""
        self._interrupted.set()

    def resume(self) -> None:
        self._interrupted.clear()

    def close(self) -> None:
        self._connection.disconnect()

    def _connect(self) -> None:
        if self._connection.is_connected:
            return
        self._connection.connect()
        self.number += 1
        self._since = time.monotonic()
        self._refuse_forgetful()
        status, *found = self.run(REFS, "attach", self._proof, _FORMAT)
        if status == b"denied":
            self._connection.disconnect()
            mine = "another token" if self._proof else "no token"
            raise AccessDenied(
                f"this run's refs are kept under a token, or under none, and this process has {mine}",
                where=self.where,
                hint="give every process of the run the same token, or use another run.id",
            )
        if found != [_FORMAT.encode()]:
            self._connection.disconnect()
            raise ChannelError(f"refs of format {found}, this version reads {_FORMAT}", where=self.where)

    def _refuse_forgetful(self) -> None:
        """:raises ChannelError: the server drops keys of its choice when it is full."""
        try:
            told = self.execute("INFO", "memory")
        except exceptions.NoPermissionError:
            return  # a user that may not ask
        if b"maxmemory_policy:allkeys" in told and b"maxmemory:0\r" not in told:
            self._connection.disconnect()
            raise ChannelError(
                "the server would drop this run's refs, unasked, when its memory is full",
                where=self.where,
                hint="set its maxmemory-policy to noeviction",
            )

    def _raise_if_hopeless(self, error: Exception, seconds: float, remaining: float) -> None:
        """:raises ChannelError: trying again would not help, or there is no time left for it."""
        insecure = "SSL" in str(error) or "certificate" in str(error)
        if insecure:
            raise ChannelError(
                f"no secure connection: {self._told(error)}",
                where=self.where,
                hint="rediss:// needs a server that speaks TLS and a certificate that is trusted: ?ssl_ca_certs=ca.pem",
            ) from None
        if remaining <= 0 or self._interrupted.is_set():
            raise ChannelError(
                f"the server cannot be reached, tried for {seconds:g} s: {self._told(error)}",
                where=self.where,
                hint="start it, or correct channel.url (rediss:// where, and only where, it speaks TLS)",
            ) from None

    def _denied(self, error: Exception) -> AccessDenied:
        return AccessDenied(
            f"the server lets nobody in with this user and password: {self._told(error)}",
            where=self.where,
            hint="put them into channel.url: redis://user:password@host, special characters percent-encoded",
        )

    def count(self, value: bytes, key: str) -> int:
        """A number that is kept under one of the run's keys.

        :raises ChannelError: it is none.
        """
        if not _COUNT.fullmatch(value):
            raise self.damaged(f"{self.base}:{key}")
        return int(value)

    def damaged(self, key: str) -> ChannelError:
        """The error for what no channel wrote."""
        return ChannelError(
            "what the server keeps there was not written by a channel",
            where=f"{self.where}, key {key}",
            hint="find out who else writes there; remove this run's keys, then run again",
        )

    def _told(self, error: Exception) -> str:
        """The client's or the server's message, shortened; a timeout has none."""
        said = str(error) or type(error).__name__
        for secret in self._secrets:
            said = said.replace(secret, HIDDEN)
        return redact_message(said)[:_SAID_CHARACTERS]

    def _refused(self, error: exceptions.ResponseError) -> ChannelError:
        if found := _DAMAGED.search(str(error)):
            return self.damaged(found[1])
        hints = (hint for kind, word, hint in _HINTS if isinstance(error, kind) and word in str(error))
        return ChannelError(f"the server refuses: {self._told(error)}", where=self.where, hint=next(hints, ""))


def _secrets_of(options: Mapping[str, Any], proof: str) -> list[str]:
    """What no message may tell, longest first: a server may quote the command that it refuses."""
    given = [proof, *(value for name, value in options.items() if name == "username" or is_secret_name(name))]
    return sorted({str(secret) for secret in given if secret}, key=len, reverse=True)


def text(value: bytes) -> str:
    """What a script returned, as it was given to it."""
    return value.decode("utf-8", "replace")


def plain(value: str) -> bytes:
    """A name or a reason as the server keeps it; what is not text in UTF-8 becomes readable."""
    return value.encode("utf-8", "backslashreplace")
