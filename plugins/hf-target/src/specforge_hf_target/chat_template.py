# SPDX-License-Identifier: Apache-2.0
"""Renders a chat template, which is a program that came with the model, within limits.

transformers runs templates in jinja's sandbox: they reach no file and no code. Nothing there bounds their time or size,
so both are bounded here, as far as one process can bound itself: a loop is ended when it has taken ``MAX_SECONDS`` (in
the main thread, where prompts are prepared), and a text longer than ``MAX_CHARACTERS`` is refused. One single operation
on an enormous number or text runs to its end, in as much memory as the machine gives, before either is noticed.
"""

from __future__ import annotations

import datetime
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from specforge_core.contracts import DataError, RenderedText
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from specforge_hf_target.model_files import refusing

MAX_SECONDS = 10.0
"""A conversation of a million characters is rendered in hundredths of a second."""
MAX_CHARACTERS = 64 << 20
"""Far beyond any conversation that a model takes: sixteen million tokens of four characters."""


_COMMENTS = re.compile(r"\{#.*?#\}", re.DOTALL)
_MARKS_ASSISTANT = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@lru_cache(maxsize=16)
def marks_assistant(template: str) -> bool:
    """Whether the template marks the assistant's text, outside its comments."""
    return _MARKS_ASSISTANT.search(_COMMENTS.sub("", template)) is not None


def render_template(
    template: str, messages: Sequence[Mapping[str, Any]], *, variables: Mapping[str, Any], date: datetime.date | None
) -> RenderedText:
    """The conversation as text, and the spans that the template marks as assistant's where it does.

    The environment is transformers' own, but a template is also told which day it is (``strftime_now``).

    :param variables: what the template sees besides the messages: ``tools``, ``add_generation_prompt``, special tokens.
    :raises DataError: the template refuses the conversation, fails, or does not come to an end.
    """
    given = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        **variables,
        "messages": [_with_thought(m) for m in messages],
    }
    if date is not None:
        given["strftime_now"] = datetime.datetime.combine(date, datetime.time()).strftime
    with (
        refusing(
            "the chat template refuses the conversation",
            hint="leave the row out, or give it as the template wants it (roles, tools, data.template_arguments)",
            kind=DataError,
        ),
        _time_limit(),
    ):
        compiled = _compile_jinja_template(template)
        if marks_assistant(template):
            text, marked = _render_with_assistant_indices(compiled_template=compiled, **given)
        else:
            text, marked = compiled.render(**given), None
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"the chat template makes {len(text)} characters of the conversation, more than {MAX_CHARACTERS}",
            hint="correct the template, or leave the conversation out",
        )
    return RenderedText(text, marked)


_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")


def _with_thought(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A thought under every name by which templates read it (transformers itself gives it two of them)."""
    thought = next((message[key] for key in _THOUGHT_KEYS if message.get(key) is not None), None)
    return message if thought is None else {**message, **dict.fromkeys(_THOUGHT_KEYS, thought)}


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError inside after ``MAX_SECONDS``. A timer that was set before goes on afterwards."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"it has not ended after {MAX_SECONDS:g} s")

    handler, began = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
