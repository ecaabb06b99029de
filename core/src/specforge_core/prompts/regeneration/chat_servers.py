# SPDX-License-Identifier: Apache-2.0
"""Servers with the widely spoken chat API as an ``AnswerSource``: hundreds of requests in flight, over several servers.

Each request in flight is a thread that waits. It goes to the living server that has the fewest. A server that cannot be
reached is left alone for a while, longer each time, and then asked whether it is back. Requests that a server could
not take (too busy, an error of its own, a connection that broke) are tried again, elsewhere where there is one; what it
refuses is an answer that failed. Only when no server has been there for ``timeout_seconds`` does the work end.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from specforge_core.contracts import (
    DataError,
    GeneratedAnswer,
    GenerationRequest,
    GenerationSettings,
    SpecForgeError,
    StopSignal,
    TargetError,
)
from specforge_core.contracts.files import read_bytes
from specforge_core.prompts.regeneration.chat_api import make_body, read_answer, read_error
from specforge_core.prompts.regeneration.http_calls import Address, CallFailed, HttpCalls
from specforge_core.prompts.regeneration.server_pool import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Server,
    ServerPool,
    refused,
)

_log = logging.getLogger(__name__)

_TICK_SECONDS = 0.1
"""How late a stop or a deadline is noticed; an answer takes seconds."""
_BUSY = frozenset((408, 409, 425, 429))
_KEY_BYTES = 1 << 16
"""A longer file is none that holds a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Who is asked, and how long.

    :param model: its name on the servers; None: the only one they have.
    """

    addresses: Sequence[str]
    model: str | None = None
    api_key_file: Path | None = None
    concurrency: int = 64
    timeout_seconds: float = 600.0
    retries: int = 5


class ChatServers:
    """An ``AnswerSource``. Nothing is called before ``describe`` or ``answer``.

    :raises DataError: an address or the key file cannot be used.
    """

    answers_together = False

    def __init__(self, settings: ServerSettings, *, stop: StopSignal) -> None:
        self._settings = settings
        self._stop = stop
        self._headers = _make_headers(settings.api_key_file)
        addresses = [Address.parse(text) for text in settings.addresses]
        self._pool = ServerPool(addresses, model=settings.model, timeout_seconds=settings.timeout_seconds)
        self._described: dict[str, str] | None = None
        self._todo: queue.SimpleQueue[GenerationRequest | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[GeneratedAnswer | SpecForgeError] = queue.SimpleQueue()
        self._calls: list[HttpCalls] = []
        self._threads = 0

    def describe(self) -> Mapping[str, str]:
        """Model and version, as the servers say.

        :raises TargetError: none is there, or they have not the model; those that are not there yet may come later.
        """
        if self._described is None:
            calls = HttpCalls(self._headers)
            self._calls.append(calls)
            found = [self._pool.look_at(calls, server) for server in self._pool.servers]
            known = [described for described in found if described is not None]
            if not known:
                reasons = "; ".join(f"{server.address}: {server.down}" for server in self._pool.servers)
                raise TargetError(
                    f"no server answers ({reasons})",
                    where="regenerate.servers",
                    hint="start one, or correct the addresses",
                )
            if len({described["model"] for described in known}) > 1:
                raise TargetError(
                    f"the servers have different models: {', '.join(sorted({item['model'] for item in known}))}",
                    where="regenerate.servers",
                    hint="name the one that is meant in regenerate.model",
                )
            versions = sorted({described["server"] for described in known if described["server"]})
            self._described = {"model": known[0]["model"], "server": ", ".join(versions)}
        return self._described

    def answer(
        self, requests: Iterable[GenerationRequest | None], settings: GenerationSettings
    ) -> Iterator[GeneratedAnswer]:
        model = self.describe()["model"]
        waiting, in_flight = iter(requests), 0
        while True:
            while in_flight < self._settings.concurrency and (request := next(waiting, None)) is not None:
                in_flight += 1
                if in_flight > self._threads:
                    self._start_thread(settings, model)
                self._todo.put(request)
            if not in_flight:
                return
            answer = self._wait()
            in_flight -= 1
            yield answer

    def close(self) -> None:
        self._pool.close()
        for _ in range(self._threads):
            self._todo.put(None)
        for calls in self._calls:
            calls.close()

    def _wait(self) -> GeneratedAnswer:
        """The next answer that is done; each has deadlines of its own."""
        while True:
            self._stop.raise_if_requested()
            try:
                done = self._done.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            if isinstance(done, SpecForgeError):
                raise done
            return done

    def _start_thread(self, settings: GenerationSettings, model: str) -> None:
        calls = HttpCalls(self._headers)
        self._calls.append(calls)
        self._threads += 1
        threading.Thread(target=self._serve, args=(calls, settings, model), daemon=True).start()

    def _serve(self, calls: HttpCalls, settings: GenerationSettings, model: str) -> None:
        """A thread's work: one request after the other."""
        while (request := self._todo.get()) is not None and not self._pool.closed:
            try:
                self._done.put(_Request(self, calls, request, settings, model=model).run())
            except SpecForgeError as error:
                self._done.put(error)

    @property
    def pool(self) -> ServerPool:
        return self._pool

    @property
    def settings(self) -> ServerSettings:
        return self._settings


class _Request:
    """One request until it has its answer, whatever that is."""

    def __init__(
        self,
        owner: ChatServers,
        calls: HttpCalls,
        request: GenerationRequest,
        settings: GenerationSettings,
        *,
        model: str,
    ) -> None:
        self._owner = owner
        self._calls = calls
        self._request = request
        self._settings = settings
        self._model = model
        self._tries = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._without_ids = False
        self._last: Server | None = None

    def run(self) -> GeneratedAnswer:
        """:raises TargetError: nobody answers any more, or nobody may."""
        while True:
            server, looked_for = self._owner.pool.choose(rather_not=self._last)
            try:
                if looked_for and not self._owner.pool.look_at(self._calls, server):
                    continue
                answer = self._try(server)
            finally:
                self._owner.pool.give_back(server)
            if answer is not None:
                return answer
            self._last = server

    def _try(self, server: Server) -> GeneratedAnswer | None:
        """The answer; None: try again."""
        asks_ids = server.asks_ids and not self._without_ids
        body = make_body(self._request, self._settings, model=self._model, ask_ids=asks_ids)
        seconds = self._owner.settings.timeout_seconds
        try:
            reply = self._calls.post(server.address, "/chat/completions", body, seconds=seconds)
        except CallFailed as failed:
            self._owner.pool.mark_down(server, str(failed))
            return self._again(f"{server.address} {failed}") if failed.sent else None
        if reply.status == 200:
            if self._without_ids and server.asks_ids:
                server.asks_ids = False  # this was all that it refused
                _log.warning("%s refuses to return token ids; its answers are kept as text", server.address)
            try:
                return read_answer(self._request.request_id, reply.body)
            except ValueError as error:
                return self._again(f"{server.address} sent what is no answer: {error}")
        said = read_error(reply.body)
        if reply.status in _BUSY or reply.status >= 500:
            return self._again(f"{server.address}: status {reply.status} {said}".rstrip(), wait=reply.retry_after)
        if reply.status in (400, 422) and asks_ids:
            self._without_ids = True  # some refuse what they do not know; others, this request whatever it asks
            return None
        if reply.status in (400, 413, 422):
            return self._fail(f"refused: status {reply.status} {said}".rstrip())
        raise refused(server, reply)

    def _again(self, reason: str, *, wait: float = 0.0) -> GeneratedAnswer | None:
        """Pause before the next try; after the last, the answer that failed."""
        self._tries += 1
        if self._tries > self._owner.settings.retries:
            return self._fail(reason)
        pause = min(max(self._pause * random.uniform(0.5, 1.5), wait), LONGEST_PAUSE_SECONDS)
        self._pause *= 2
        until = time.monotonic() + pause
        while not self._owner.pool.closed and (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, _TICK_SECONDS))
        return None

    def _fail(self, reason: str) -> GeneratedAnswer:
        return GeneratedAnswer(self._request.request_id, "failed", error=reason)


def _make_headers(key_file: Path | None) -> dict[str, str]:
    if key_file is None:
        return {"Accept": "application/json"}
    try:
        key = read_bytes(key_file, limit=_KEY_BYTES).decode("ascii").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise DataError(
            f"the key cannot be read: {reason}", where=str(key_file), hint="correct regenerate.api_key_file"
        ) from error
    if not key or not key.isprintable():
        raise DataError("holds no key on one line", where=str(key_file), hint="put the key alone into the file")
    return {"Accept": "application/json", "Authorization": f"Bearer {key}"}
