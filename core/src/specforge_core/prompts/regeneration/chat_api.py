# SPDX-License-Identifier: Apache-2.0
"""One chat completion as the widely spoken HTTP API has it: a request's body, and what a response says. Pure.

What comes back was written by somebody else: every field is looked at before it is believed, and what is not there is
not made up. Token ids are asked for where a server offers them (``return_token_ids``); others ignore that, or refuse
it, and are asked without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specforge_core.contracts import GeneratedAnswer, GenerationRequest, GenerationSettings
from specforge_core.contracts.generation import FinishReason

_FINISH_REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "calls",
    "function_call": "calls",
}
_THOUGHT_KEYS = ("reasoning_content", "reasoning")
_MAX_IDS = 1 << 24
"""Sixteen million tokens: beyond any context."""
_MAX_TOKEN_ID = (1 << 31) - 1
"""Token ids are kept in 32 bits."""
_MAX_CALLS = 1024
"""Of one answer: models make a few, and a server can be told to claim any number."""
_COUNTS = ("prompt_tokens", "completion_tokens")
_MESSAGE_CHARACTERS = 500
"""Of a server's own words in an error: its message, without the page around it."""


def make_body(request: GenerationRequest, settings: GenerationSettings, *, model: str, ask_ids: bool) -> bytes:
    """The body of ``POST /chat/completions``. What a server need not know (``top_k`` 0, no variables) is not said."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [_as_asked(message) for message in request.messages],
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": request.seed,
        "stream": False,
    }
    if settings.top_p < 1:
        body["top_p"] = settings.top_p
    if settings.top_k:
        body["top_k"] = settings.top_k
    if request.tools:
        body["tools"] = list(request.tools)
    if request.arguments:
        body["chat_template_kwargs"] = dict(request.arguments)
    if ask_ids:
        body["return_token_ids"] = True
    return json.dumps(body).encode()


def _as_asked(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as the API takes it: its calls' arguments are JSON text there, and have an id."""
    asked = dict(message)
    if "tool_calls" in asked:
        asked["tool_calls"] = [_call_as_asked(call, index) for index, call in enumerate(asked["tool_calls"])]
    if asked["role"] == "assistant":
        asked.setdefault("content", None)
    return asked


def _call_as_asked(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    function = dict(call.get("function", {key: call[key] for key in ("name", "arguments") if key in call}))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": str(call.get("id") or f"call_{index}"), "type": "function", "function": function}


def read_answer(request_id: str, body: Any) -> GeneratedAnswer:
    """What a response says.

    :raises ValueError: it is no chat completion, or one that contradicts itself.
    """
    choice = _first_choice(body)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("the choice has no message")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISH_REASONS:
        return GeneratedAnswer(request_id, "failed", error=f"the server ended it: finish_reason {str(reason)[:100]!r}")
    calls = _read_calls(message.get("tool_calls"))
    token_ids = _read_ids(choice.get("token_ids"), "token_ids")
    prompt_ids = _read_ids(_first_of(body, choice, "prompt_token_ids"), "prompt_token_ids")
    finish_reason = _FINISH_REASONS[reason]
    if calls and finish_reason == "stop":
        finish_reason = "calls"
    return GeneratedAnswer(
        request_id,
        finish_reason,
        content=_read_text(message.get("content"), "content") or "",
        thought=_read_text(_first_of(message, message, *_THOUGHT_KEYS), "reasoning_content"),
        tool_calls=calls,
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        usage=_read_usage(body.get("usage")),
    )


def _first_choice(body: Any) -> Mapping[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("the response has no choices")
    return choices[0]


def _first_of(outer: Mapping[str, Any], inner: Mapping[str, Any], *keys: str) -> Any:
    found = (holder.get(key) for key in keys for holder in (outer, inner))
    return next((value for value in found if value is not None), None)


def _read_text(value: Any, key: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{key} is a {type(value).__name__}")
    value.encode()  # a lone surrogate, which JSON can spell, cannot be written down: UnicodeEncodeError is a ValueError
    return value


def _read_ids(value: Any, key: str) -> tuple[int, ...] | None:
    if not value:
        return None
    if not isinstance(value, list) or len(value) > _MAX_IDS:
        raise ValueError(f"{key} is no list of token ids")
    if not all(type(item) is int and 0 <= item <= _MAX_TOKEN_ID for item in value):
        raise ValueError(f"{key} holds what is no token id")
    return tuple(value)


def _read_calls(value: Any) -> Sequence[Mapping[str, Any]]:
    if not value:
        return ()
    if not isinstance(value, list) or len(value) > _MAX_CALLS:
        raise ValueError("tool_calls is no list of calls")
    return [_read_call(call, index) for index, call in enumerate(value)]


def _read_call(call: Any, index: int) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool_calls[{index}] names no function")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    called = {"name": _read_text(function["name"], "name"), "arguments": _read_text(arguments, "arguments")}
    given = call.get("id")
    return {"id": given if isinstance(given, str) else f"call_{index}", "type": "function", "function": called}


def _read_usage(value: Any) -> dict[str, int]:
    if not isinstance(value, dict):
        return {}
    return {key: value[key] for key in _COUNTS if type(value.get(key)) is int and 0 <= value[key] <= _MAX_TOKEN_ID}


def read_error(body: Any) -> str:
    """What a refusing server says, in a few words; "" where it says nothing that is understood."""
    said = body
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return said[:_MESSAGE_CHARACTERS] if isinstance(said, str) else ""


def read_models(body: Any) -> list[str]:
    """The names of the models that a server has."""
    listed = body.get("data") if isinstance(body, dict) else None
    entries = listed if isinstance(listed, list) else []
    return [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
