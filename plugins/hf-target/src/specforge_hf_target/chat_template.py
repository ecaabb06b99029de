# SPDX-License-Identifier: Apache-2.0
"""Renders a chat template, which is a program that came with the model, within limits.

transformers runs templates in jinja's sandbox: they reach no file and no code. Nothing there bounds their time or size,
so both are bounded here, as far as one process can bound itself: a loop is ended when it has taken ``MAX_SECONDS`` (in
the main thread, where prompts are prepared), and a text longer than ``MAX_CHARACTERS`` is refused. One single operation
on an enormous number or text runs to its end, in as much memory as the machine gives, before either is noticed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from specforge_core.contracts import DataError
from transformers.utils.chat_template_utils import render_jinja_template

from specforge_hf_target.model_files import refusing

MAX_SECONDS = 10.0
"""A conversation of a million characters is rendered in hundredths of a second."""
MAX_CHARACTERS = 64 << 20
"""Far beyond any conversation that a model takes: sixteen million tokens of four characters."""


def render_template(
    template: str, messages: Sequence[Mapping[str, str]], *, tokens: Mapping[str, str], **options: bool
) -> tuple[str, list[list[tuple[int, int]]]]:
    """The conversation as text, and the spans that the template marks as assistant's where ``options`` ask for them.

    :param tokens: the special tokens, which templates name.
    :raises DataError: the template refuses the conversation, fails, or does not come to an end.
    """
    with (
        refusing(
            "the chat template refuses the conversation",
            hint="roles must come as the template wants them",
            kind=DataError,
        ),
        _time_limit(),
    ):
        [text], spans = render_jinja_template(
            conversations=[list(messages)], chat_template=template, **{**tokens, **options}
        )
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"the chat template makes {len(text)} characters of the conversation, more than {MAX_CHARACTERS}",
            hint="correct the template, or leave the conversation out",
        )
    return text, spans


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
