# SPDX-License-Identifier: Apache-2.0
"""One exchange with an OpenAI-compatible server: what is sent, and what an answer must be to be believed.

The standard library's client is enough: one connection per thread, plain requests, bounded answers, no redirects.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from specforge_core.contracts import ConfigError, GeneratedAnswer, GenerationRequest, GenerationSettings
from specforge_core.contracts.generation import FinishReason

MAX_BODY_BYTES = 64 << 20
"""A million tokens with their texts; a server that sends more is not one."""
EXTENSIONS = ("return_token_ids", "chat_template_kwargs", "top_k")
"""Fields that not every server knows."""
_MOST_WORDS = 300
_REASONS: Mapping[str, FinishReason] = {
    **{"stop": "stop", "length": "length", "tool_calls": "calls", "function_call": "calls"}
}


class TryAgain(Exception):
    """The server did not answer, or not as it should; another try may do better.

    :ivar after: seconds to wait, if the server said so.
    """

    def __init__(self, reason: str, *, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Refused(Exception):
    """The server will not answer this request, whoever asks again. :ivar status: of HTTP."""

    def __init__(self, reason: str, *, status: int):
        super().__init__(reason)
        self.status = status


def parse_address(address: str) -> SplitResult:
    """:raises ConfigError: it is no address of a server's API."""
    hint = "such as http://host:8000/v1"
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise ConfigError(f"is no address: {error}", where="regenerate.servers", hint=hint) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("is no http or https address", where="regenerate.servers", hint=hint)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            "addresses hold no credentials, query or fragment", where="regenerate.servers", hint="use api_key_file"
        )
    return parts


class Connection:
    """Kept open between requests. Used by one thread.

    :param key: sent as a bearer token; never shown.
    """

    def __init__(self, address: SplitResult, *, key: str | None, timeout_seconds: float):
        self._address = address
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        host, port = str(address.hostname), address.port
        self._http: http.client.HTTPConnection
        if address.scheme == "https":
            context = ssl.create_default_context()
            self._http = http.client.HTTPSConnection(host, port, timeout=timeout_seconds, context=context)
        else:
            self._http = http.client.HTTPConnection(host, port, timeout=timeout_seconds)

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON value that is answered.

        :raises TryAgain: nothing came, or not what a server sends. :raises Refused: the server says no.
        """
        content = None if body is None else json.dumps(body).encode()
        try:
            self._http.request(method, path, content, self._headers)
            response = self._http.getresponse()
            received = response.read(MAX_BODY_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise TryAgain(f"{type(error).__name__}: {error}"[:_MOST_WORDS]) from error
        if len(received) > MAX_BODY_BYTES:
            self.close()
            raise TryAgain(f"the answer is longer than {MAX_BODY_BYTES} bytes")
        status = response.status
        if status != http.client.OK:
            said = f"HTTP {status}: {_words(received)}"
            if status in (408, 425, 429) or status >= 500:
                raise TryAgain(said, after=_seconds(response.headers.get("Retry-After")))
            raise Refused(said, status=status)
        try:
            return json.loads(received)
        except (ValueError, RecursionError) as error:
            raise TryAgain("the answer is not JSON") from error

    def close(self) -> None:
        """The next request connects again."""
        self._http.close()


def make_body(
    request: GenerationRequest, settings: GenerationSettings, *, model: str, unknown: Sequence[str]
) -> dict[str, Any]:
    """A chat completion's request.

    :param unknown: extensions that this server does not take.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": request.seed,
        "return_token_ids": True,
    }
    if request.tools:
        body["tools"] = list(request.tools)
    if request.arguments:
        body["chat_template_kwargs"] = dict(request.arguments)
    if settings.top_k:
        body["top_k"] = settings.top_k
    return {name: value for name, value in body.items() if name not in unknown}


def read_answer(request_id: str, answered: Any) -> GeneratedAnswer:
    """:raises TryAgain: it is not a chat completion."""
    try:
        choice = answered["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or message.get("reasoning")
        calls = message.get("tool_calls") or []
        usage = answered.get("usage") or {}
        good = isinstance(content, str) and (thought is None or isinstance(thought, str)) and _are_calls(calls)
    except (KeyError, IndexError, TypeError, AttributeError):
        good = False
    if not good:
        raise TryAgain("the answer is no chat completion")
    if reason not in _REASONS:
        return GeneratedAnswer(request_id, "failed", error=f"the server ended the answer with {str(reason)[:80]!r}")
    return GeneratedAnswer(
        request_id,
        _REASONS[reason] if not calls or reason == "length" else "calls",
        content=content,
        thought=thought,
        tool_calls=calls,
        prompt_ids=_token_ids(answered.get("prompt_token_ids") or choice.get("prompt_token_ids")),
        token_ids=_token_ids(choice.get("token_ids")),
        usage={name: value for name, value in usage.items() if type(value) is int},
    )


def _are_calls(calls: object) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str)
        for call in calls
    )


def _token_ids(value: object) -> list[int] | None:
    good = isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value)
    return value if good and isinstance(value, list) else None


def _words(received: bytes) -> str:
    text = received[: 4 * _MOST_WORDS].decode(errors="replace")
    try:
        content = json.loads(received)
        error = content.get("error", content) if isinstance(content, dict) else content
        text = str(error.get("message", text)) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        pass
    return " ".join(text.split())[:_MOST_WORDS]


def _seconds(value: str | None) -> float | None:
    try:
        return max(float(value), 0.0) if value is not None else None
    except ValueError:
        return None
