# SPDX-License-Identifier: Apache-2.0
"""Chunks of rows through worker processes and back in their order, so that the result does not depend on how many.

Each worker makes its own tokenizer and encodes in its main thread, where a template's time can be bounded. It always
has the next chunk at hand. A worker that dies or shows no result is an error that names the rows it had.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from specforge_core.contracts import ChatTokenizer, SpecForgeError
from specforge_core.prompts.row_encoder import Chunk, ChunkOutcome, EncodingWork, RowEncoder

_log = logging.getLogger(__name__)

DEADLINE_SECONDS = 600.0
"""For one chunk, the worker's start included. Loading a tokenizer takes seconds, a chunk of the longest rows less than
a minute, and a template is stopped after some seconds a row."""
_AT_HAND = 2
"""Chunks that a worker has: the one it encodes and the next."""
_AHEAD = 4
"""Chunks for each worker between the one that is wanted next and the last one handed out: one slow chunk keeps the
others busy, and memory stays bounded."""
_LEAVE_SECONDS = 5.0
"""A worker that was told to leave may have one chunk of rows in hand; then it is ended."""
_GRACE_SECONDS = 5.0
"""At the least, even where the deadline passed: all processes may have been stopped together, and go on together."""


class TokenizerFactory(ABC):
    """Makes the target's tokenizer wherever it is sent: a value, importable by name, of values."""

    @abstractmethod
    def __call__(self) -> ChatTokenizer: ...


class WorkerLost(SpecForgeError):
    """A process that prepared prompts died, or stopped. What was prepared is kept, and the next preparation goes on."""


def encode_in_order(
    chunks: Iterable[Chunk], work: EncodingWork, *, workers: int, deadline_seconds: float = DEADLINE_SECONDS
) -> Iterator[tuple[Chunk, ChunkOutcome]]:
    """Every chunk with what became of it, in order; in this process where one is enough or the tokenizer stays here.

    :raises SpecForgeError: what encoding raised, when its chunk's turn comes.
    :raises WorkerLost: a worker died, or gave no result within the deadline.
    """
    if workers == 1 or not isinstance(work.tokenizer, TokenizerFactory):
        encoder = RowEncoder(work)
        for chunk in chunks:
            yield chunk, encoder.encode(chunk)
        return
    pool = _Pool(work, workers, deadline_seconds)
    try:
        yield from pool.encode(chunks)
        pool.leave()
    finally:
        pool.kill()


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    outbox: queue.SimpleQueue[Chunk | None]
    chunks: deque[tuple[int, Chunk]] = field(default_factory=deque)
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class _Reply:
    """What a worker sends for one chunk.

    :param warnings: what was logged meanwhile.
    """

    outcome: ChunkOutcome | SpecForgeError
    warnings: tuple[str, ...] = ()


class _Pool:
    """Workers, started as there is work for them."""

    def __init__(self, work: EncodingWork, workers: int, deadline_seconds: float) -> None:
        self._work = work
        self._most = workers
        self._deadline_seconds = deadline_seconds
        self._inbox: queue.SimpleQueue[tuple[int, _Reply | None]] = queue.SimpleQueue()
        self._done: dict[int, _Reply] = {}
        self._said: set[str] = set()
        self._workers: list[_Worker] = []

    def _start(self) -> _Worker:
        context, index = multiprocessing.get_context("spawn"), len(self._workers)
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, self._work), name=f"prompts-{index}", daemon=True)
        process.start()
        there.close()
        worker = _Worker(process, queue.SimpleQueue())
        self._workers.append(worker)
        # Threads, so that a worker that is stopped in the middle of a message stops nobody but itself.
        threading.Thread(target=_send_all, args=(here, worker.outbox), daemon=True).start()
        threading.Thread(target=_receive_all, args=(here, self._inbox, index), daemon=True).start()
        return worker

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, ChunkOutcome]]:
        numbered = enumerate(chunks)
        waiting: dict[int, Chunk] = {}
        wanted, given = 0, next(numbered, None)
        while given is not None or waiting:
            while given is not None and len(waiting) < _AHEAD * self._most and (worker := self._least_busy()):
                waiting[given[0]] = given[1]
                self._hand_out(worker, *given)
                given = next(numbered, None)
            while wanted not in self._done:
                self._receive()
            yield waiting.pop(wanted), self._take(wanted)
            wanted += 1

    def _least_busy(self) -> _Worker | None:
        """A worker that can take a chunk; None if all have enough."""
        least = min(self._workers, key=lambda worker: len(worker.chunks), default=None)
        if len(self._workers) < self._most and (least is None or least.chunks):
            return self._start()
        return least if least is not None and len(least.chunks) < _AT_HAND else None

    def _hand_out(self, worker: _Worker, number: int, chunk: Chunk) -> None:
        if not worker.chunks:
            worker.since = time.monotonic()
        worker.chunks.append((number, chunk))
        worker.outbox.put(chunk)

    def _receive(self) -> None:
        busy = [worker for worker in self._workers if worker.chunks]
        first = min(busy, key=lambda worker: worker.since)
        left = first.since + self._deadline_seconds - time.monotonic()
        try:
            index, reply = self._inbox.get(timeout=max(left, min(self._deadline_seconds, _GRACE_SECONDS)))
        except queue.Empty:
            raise WorkerLost(
                f"a process that prepares prompts has given no result for {self._deadline_seconds:.0f} s",
                where=str(first.chunks[0][1]),
                hint="look at these rows, or set data.workers to 1; what was prepared is kept",
            ) from None
        worker = self._workers[index]
        if reply is None:
            raise self._died(worker)
        self._done[worker.chunks.popleft()[0]] = reply
        worker.since = time.monotonic()

    def _died(self, worker: _Worker) -> WorkerLost:
        worker.process.join(_LEAVE_SECONDS)
        status = worker.process.exitcode
        how = f"was ended by signal {-status}" if status is not None and status < 0 else f"ended with status {status}"
        return WorkerLost(
            f"a process that prepared prompts {how}",
            where=str(worker.chunks[0][1]) if worker.chunks else "",
            hint="look at these rows, give it more memory, or set data.workers to 1; what was prepared is kept",
        )

    def _take(self, number: int) -> ChunkOutcome:
        reply = self._done.pop(number)
        for warning in reply.warnings:
            if warning not in self._said:
                self._said.add(warning)
                _log.warning("%s", warning)
        if isinstance(reply.outcome, SpecForgeError):
            raise reply.outcome
        return reply.outcome

    def leave(self) -> None:
        """Let the workers end by themselves."""
        for worker in self._workers:
            worker.outbox.put(None)
        until = time.monotonic() + _LEAVE_SECONDS
        for worker in self._workers:
            worker.process.join(max(until - time.monotonic(), 0.0))

    def kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()  # a stopped process heeds nothing else
        for worker in self._workers:
            worker.outbox.put(None)
            worker.process.join()
            worker.process.close()


def _send_all(connection: Connection, outbox: queue.SimpleQueue[Chunk | None]) -> None:
    try:
        while True:
            chunk = outbox.get()
            connection.send(chunk)
            if chunk is None:
                return
    except OSError:  # it died: the thread that receives says so
        return


def _receive_all(connection: Connection, inbox: queue.SimpleQueue[tuple[int, _Reply | None]], index: int) -> None:
    try:
        while True:
            inbox.put((index, connection.recv()))
    except (EOFError, OSError):
        inbox.put((index, None))


class _Warnings(logging.Handler):
    """Keeps what this process would warn of, to be said once by the process that reads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        kept, self.kept = tuple(self.kept), []
        return kept


def _work(connection: Connection, work: EncodingWork) -> None:
    """What a worker process does until there are no more chunks, or nobody to send them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that reads decides
    warnings = _Warnings()
    logging.getLogger("specforge_core.prompts").addHandler(warnings)
    inbox: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
    encoder = RowEncoder(work)
    while (chunk := inbox.get()) is not None:
        outcome: ChunkOutcome | SpecForgeError
        try:
            outcome = encoder.encode(chunk)
        except SpecForgeError as error:
            outcome = error
        try:
            connection.send(_Reply(outcome, warnings.take()))
        except OSError:  # the process that reads is gone
            return


def _take_in(connection: Connection, inbox: queue.SimpleQueue[Chunk | None]) -> None:
    """A thread, so that whoever sends never waits for a chunk to be encoded."""
    try:
        while True:
            chunk = connection.recv()
            inbox.put(chunk)
            if chunk is None:
                return
    except (EOFError, OSError):
        os._exit(1)  # the process that reads is gone
