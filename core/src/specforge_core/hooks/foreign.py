# SPDX-License-Identifier: Apache-2.0
"""The border to plugin code: whatever is raised on the other side ends the call, and nothing else.

A plugin may call ``sys.exit`` or raise ``KeyboardInterrupt`` as well as any error; the user's Ctrl-C is told from it.
(A plugin that ends the process itself, by ``os._exit`` or a crash, cannot be stopped here.)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from specforge_core.contracts import PluginError
from specforge_core.contracts.redaction import redact_message

_SAID_CHARACTERS = 2000
"""Errors of compilers and servers are long, and their cause stands near the beginning."""


class _UsersInterrupt(KeyboardInterrupt):
    """Ctrl-C, told from a KeyboardInterrupt that a plugin raises."""


@contextmanager
def foreign_code(broken: Callable[[str], PluginError]) -> Iterator[None]:
    """While plugin code runs, turn what it raises into the error that ``broken`` makes of its description.

    :raises PluginError: what ``broken`` makes, or one that was raised inside.
    :raises KeyboardInterrupt: the user's Ctrl-C.
    """
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT)
    raises = in_main and previous is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except (_UsersInterrupt, PluginError):
        raise
    except BaseException as error:
        raise broken(describe_failure(error)) from error
    finally:
        if raises:
            signal.signal(signal.SIGINT, previous)


def describe_failure(error: BaseException) -> str:
    """Kind and message of what plugin code raised; its message is made by plugin code too."""
    try:
        said = str(error)
    except BaseException:  # noqa: BLE001  even to say what is wrong may go wrong
        said = "(its message cannot be made)"
    return redact_message(f"{type(error).__name__}: {said}"[:_SAID_CHARACTERS])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _UsersInterrupt
