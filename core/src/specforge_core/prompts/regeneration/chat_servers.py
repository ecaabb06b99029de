# SPDX-License-Identifier: Apache-2.0
"""OpenAI-compatible servers as a source of answers: many requests in flight, over all that are up.

A request goes to the server with the fewest in flight. One that fails is left alone for a growing while. What none of
them answers for ``regenerate.timeout_seconds`` ends the run; a request that is refused is a failed answer, with the
server's words.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult

from specforge_core.contracts import (
    AnswerSource,
    ConfigError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    SpecForgeError,
    TargetError,
)
from specforge_core.prompts.regeneration.chat_request import (
    EXTENSIONS,
    Connection,
    Refused,
    TryAgain,
    make_body,
    parse_address,
    read_answer,
)

if TYPE_CHECKING:
    from specforge_core.config.run_config import RegenerateSection

_log = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
"""Between tries of a request, and before a server that failed is asked again: doubled each time."""
_TICK_SECONDS = 0.2
_FORBIDDEN = (401, 403, 404)


@dataclass(slots=True)
class _Server:
    address: SplitResult
    model: str = ""
    in_flight: int = 0
    failures: int = 0
    down_until: float = 0.0
    unknown: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.address.geturl()

    @property
    def path(self) -> str:
        return self.address.path.rstrip("/")


class ChatServers(AnswerSource):
    """See the module.

    :param key: sent to each of them as a bearer token.
    :raises ConfigError: an address is none.
    """

    def __init__(self, settings: RegenerateSection, *, key: str | None):
        self._settings = settings
        self._key = key
        self._servers = [_Server(parse_address(address)) for address in settings.servers]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._last_answer = time.monotonic()

    @property
    def in_flight(self) -> int:
        return self._settings.concurrency

    def describe(self) -> Mapping[str, str]:
        """Waits for servers that are starting, as long as for an answer."""
        facts = []
        for server in self._servers:
            server.model = self._find_model(server)
            facts.append(f"{server.name} {self._find_version(server)}".strip())
        models = sorted({server.model for server in self._servers})
        if len(models) > 1:
            raise ConfigError(
                f"the servers serve different models: {', '.join(models)}",
                where="regenerate.servers",
                hint="choose one",
            )
        return {"model": models[0], "servers": ", ".join(facts)}

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        asked: queue.SimpleQueue[GenerationRequest | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[GeneratedAnswer | BaseException] = queue.SimpleQueue()
        self._closed.clear()
        self._last_answer = time.monotonic()
        threads = [
            threading.Thread(target=self._work, args=(asked, done, settings), daemon=True, name=f"answers {n}")
            for n in range(self.in_flight)
        ]
        for thread in threads:
            thread.start()
        waiting, active, more = iter(requests), 0, True
        try:
            while active or more:
                request = next(waiting, _END) if more and active < self.in_flight else None
                more = more and request is not _END
                if isinstance(request, GenerationRequest):
                    asked.put(request)
                    active += 1
                    continue
                answered = self._next(done)
                if isinstance(answered, BaseException):
                    raise answered
                if answered is not None:
                    active -= 1
                    yield answered
        finally:
            self._closed.set()
            for _ in threads:
                asked.put(None)

    def close(self) -> None:
        self._closed.set()

    def _next(self, done: queue.SimpleQueue[GeneratedAnswer | BaseException]) -> GeneratedAnswer | BaseException | None:
        """None where there is nothing yet. :raises TargetError: nobody answered for too long."""
        try:
            answered = done.get(timeout=_TICK_SECONDS)
        except queue.Empty:
            silent = time.monotonic() - self._last_answer
            if all(server.failures for server in self._servers) and silent > self._settings.timeout_seconds:
                raise self._nobody(f"none has answered for {silent:.0f} s") from None
            return None
        self._last_answer = time.monotonic()
        return answered

    def _work(
        self,
        asked: queue.SimpleQueue[GenerationRequest | None],
        done: queue.SimpleQueue[GeneratedAnswer | BaseException],
        settings: GenerationSettings,
    ) -> None:
        connections: dict[str, Connection] = {}
        while (request := asked.get()) is not None and not self._closed.is_set():
            try:
                done.put(self._ask(request, settings, connections))
            except SpecForgeError as error:
                done.put(error)
        for connection in connections.values():
            connection.close()

    def _ask(
        self, request: GenerationRequest, settings: GenerationSettings, connections: dict[str, Connection]
    ) -> GeneratedAnswer:
        said = ""
        for attempt in range(self._settings.retries + 1):
            server = self._choose()
            if server is None:
                break
            connection = connections.setdefault(server.name, self._connect(server))
            try:
                return self._ask_once(request, settings, server=server, connection=connection)
            except TryAgain as error:
                said = f"{server.name}: {error}"
                self._pause(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) if error.after is None else error.after)
        return GeneratedAnswer(request.request_id, "failed", error=said or "the run was stopped")

    def _ask_once(
        self, request: GenerationRequest, settings: GenerationSettings, *, server: _Server, connection: Connection
    ) -> GeneratedAnswer:
        """
        :raises TryAgain: another try may do better.
        :raises TargetError: the server lets nobody ask.
        """
        failed = True
        try:
            answer = self._exchange(request, settings, server=server, connection=connection)
            failed = False
        finally:
            self._settle(server, failed=failed)
        return answer

    def _exchange(
        self, request: GenerationRequest, settings: GenerationSettings, *, server: _Server, connection: Connection
    ) -> GeneratedAnswer:
        while True:
            body = make_body(request, settings, model=server.model, unknown=sorted(server.unknown))
            try:
                answered = connection.send("POST", f"{server.path}/chat/completions", body)
            except Refused as error:
                if error.status in _FORBIDDEN:
                    raise TargetError(str(error), where=server.name, hint="check address, model and key") from error
                if self._drop_field(server, str(error), body):
                    continue
                return GeneratedAnswer(request.request_id, "failed", error=f"{server.name}: {error}")
            return read_answer(request.request_id, answered)

    def _drop_field(self, server: _Server, said: str, body: Mapping[str, object]) -> bool:
        """Leave out a field that the server says it does not know."""
        named = next((name for name in EXTENSIONS if name in said and name in body), None)
        if named is None:
            return False
        with self._lock:
            if named not in server.unknown:
                _log.warning("%s does not take %s; it is asked without", server.name, named)
                server.unknown.add(named)
        return True

    def _choose(self) -> _Server | None:
        """The server with the fewest requests, of those that are up; None once nothing is wanted any more."""
        while not self._closed.is_set():
            with self._lock:
                now = time.monotonic()
                up = [server for server in self._servers if server.down_until <= now]
                if up:
                    chosen = min(up, key=lambda server: server.in_flight)
                    chosen.in_flight += 1
                    return chosen
            self._pause(_TICK_SECONDS)
        return None

    def _settle(self, server: _Server, *, failed: bool) -> None:
        with self._lock:
            server.in_flight -= 1
            server.failures = server.failures + 1 if failed else 0
            pause = min(_FIRST_PAUSE * 2 ** min(server.failures, 10), _LONGEST_PAUSE)
            server.down_until = time.monotonic() + pause if failed else 0.0

    def _pause(self, seconds: float) -> None:
        self._closed.wait(min(seconds, _LONGEST_PAUSE) * random.uniform(0.75, 1.25))

    def _connect(self, server: _Server) -> Connection:
        return Connection(server.address, key=self._key, timeout_seconds=self._settings.timeout_seconds)

    def _find_model(self, server: _Server) -> str:
        until = time.monotonic() + self._settings.timeout_seconds
        connection, attempt = self._connect(server), 0
        while True:
            try:
                listed = connection.send("GET", f"{server.path}/models")
                names = [str(entry["id"]) for entry in listed["data"]]
                break
            except Refused as error:
                raise TargetError(str(error), where=server.name, hint="check the address and the key") from error
            except TryAgain as error:
                attempt += 1
                if time.monotonic() > until:
                    raise self._nobody(f"{server.name}: {error}") from error
                self._pause(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE, self._settings.timeout_seconds))
            except (KeyError, TypeError) as error:
                raise TargetError("does not list its models", where=server.name, hint="check the address") from error
        wanted = self._settings.model
        if wanted is not None and wanted in names:
            return wanted
        if wanted is not None or len(names) != 1:
            raise ConfigError(
                f"{server.name} serves {', '.join(names) or 'no model'}",
                where="regenerate.model",
                hint="name one of them",
            )
        return names[0]

    def _find_version(self, server: _Server) -> str:
        """As it says at the root, beside the API; "" where it does not."""
        root = server.path.removesuffix("/v1")
        with suppress(TryAgain, Refused, KeyError, TypeError):
            return str(self._connect(server).send("GET", f"{root}/version")["version"])[:80]
        return ""

    def _nobody(self, reason: str) -> TargetError:
        names = ", ".join(server.name for server in self._servers)
        return TargetError(f"no server answers: {reason}", where=f"regenerate.servers: {names}", hint="start them")


_END = object()
