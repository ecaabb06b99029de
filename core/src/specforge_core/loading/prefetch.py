# SPDX-License-Identifier: Apache-2.0
"""One thread that reads and collates ahead of the trainer.

Results and errors come back in the order of submission. The thread is a daemon and is told to end, so neither a
store that does not answer nor a forgotten ``close`` can keep a process alive.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from specforge_core.contracts import RunStopped

T = TypeVar("T")

_CLOSE_SECONDS = 10.0


class Prefetcher(Generic[T]):
    """Runs submitted work one after another in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = queue.SimpleQueue()
        self._ahead: deque[Future[T]] = deque()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How much was submitted and not taken."""
        return len(self._ahead)

    def submit(self, work: Callable[[], T]) -> None:
        """Queue ``work``."""
        self._ahead.append(self.run(work))

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Queue ``work`` whose result the caller keeps track of."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future

    def take(self) -> Future[T]:
        """The oldest submitted work: its result or its error, now or later."""
        return self._ahead.popleft()

    def wait(self, seconds: float) -> None:
        """For work to sleep in. :raises RunStopped: nobody wants the result any more."""
        self._closed.wait(seconds)
        self.raise_if_closed()

    def raise_if_closed(self) -> None:
        """For long work to call between its parts. :raises RunStopped: nobody wants the result any more."""
        if self._closed.is_set():
            raise RunStopped("prefetching was closed")

    def close(self) -> None:
        """Drop what is queued and wait for the thread to end. Idempotent."""
        self._closed.set()
        self._work.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (item := self._work.get()) is not None and not self._closed.is_set():
            future, work = item
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - a thread boundary: it belongs to who waits for the future
                future.set_exception(error)
