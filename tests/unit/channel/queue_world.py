# SPDX-License-Identifier: Apache-2.0
"""A run in miniature, in which every interleaving and every kill can be tried: two samples, two workers, one trainer.

Each action is one atomic, durable step of one process: a call of the queue, a put, a delete, a row of the ledger. What
stands between two actions is a moment in which a process may be killed. The queue is the real book; store and ledger
are dictionaries that behave as the contracts say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from specforge_core.channel.queue_book import QueueBook
from specforge_core.contracts import CaptureBatch
from specforge_core.contracts.capture_queue import Ending, NumberedLease

WINDOWS = 2
Action = tuple[str, "World"]


def batch(window: int) -> CaptureBatch:
    return CaptureBatch(split="train", epoch=0, first=window, count=1)


@dataclass(frozen=True)
class Rules:
    """What may happen, and which promise is broken on purpose.

    :param store_keeps_highest: a put of a lower generation is refused.
    :param finish_is_fenced: only a lease that is held can be finished.
    """

    worker_kills: int = 0
    trainer_kills: int = 0
    false_deaths: int = 0
    losses: int = 0
    store_keeps_highest: bool = True
    finish_is_fenced: bool = True


@dataclass(frozen=True)
class Row:
    """A sample in the ledger."""

    generation: int
    state: Literal["here", "trained", "freed"]


@dataclass
class Worker:
    name: str
    lease: NumberedLease | None = None
    stage: Literal["idle", "put", "finish", "surplus", "dead"] = "idle"


@dataclass
class Trainer:
    """``window``: the next to train; ``cursor``: the last result that was read."""

    stage: Literal["start", "run", "ended"] = "start"
    window: int = 0
    cursor: int = 0


@dataclass
class World:
    rules: Rules
    book: QueueBook[None] = field(default_factory=QueueBook)
    store: dict[int, int] = field(default_factory=dict)
    ledger: dict[int, Row] = field(default_factory=dict)
    checkpoint: int = 0
    trainer: Trainer = field(default_factory=Trainer)
    workers: list[Worker] = field(default_factory=lambda: [Worker("w0"), Worker("w1")])
    orphans: set[tuple[int, int]] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    broken: str = ""

    def key(self) -> str:
        """Equal for worlds that behave alike."""
        return repr({name: vars(value) if name == "book" else value for name, value in vars(self).items()})

    def steps(self) -> Iterator[Action]:
        """What can happen next, kills left out."""
        yield from self._tries({"trainer": self._trainer_steps()})
        for number, worker in enumerate(self.workers):
            yield from self._tries({worker.name: self._worker_steps(number)})

    def accidents(self) -> Iterator[Action]:
        """The kills and misjudgements that may happen now."""
        rules = self.rules
        if rules.trainer_kills and self.trainer.stage != "ended":
            yield "kill trainer", self._after(lambda w: w._kill_trainer())
        for number, worker in enumerate(self.workers):
            if rules.worker_kills and worker.stage != "dead":
                yield f"kill {worker.name}", self._after(lambda w, n=number: w._kill_worker(n))  # type: ignore[misc]
            if rules.false_deaths and worker.lease is not None:
                yield f"take {worker.name} for dead", self._after(lambda w, n=number: w._misjudge(n))  # type: ignore[misc]

        if rules.losses:
            for window in self.store:
                yield f"features of {window} vanish", self._after(lambda w, n=window: w._lose(n))  # type: ignore[misc]

    def is_over(self) -> bool:
        return self.trainer.stage == "ended" and all(worker.stage == "idle" for worker in self.workers)

    def problem(self) -> str:
        """What no moment may show."""
        if self.broken:
            return self.broken
        for window, row in self.ledger.items():
            covered = row.state == "trained" and window < self.checkpoint  # being freed
            if (
                row.state != "freed"
                and not covered
                and window not in self.lost
                and self.store.get(window, 0) < row.generation
            ):
                return f"the features of sample {window} that the ledger counts on are gone"
        for result in self.book.results(self.trainer.cursor):
            window = result.lease.batch.first
            known = self.ledger.get(window)
            newest = max((r.lease.number for r in self.book.results(0) if r.lease.batch.first == window), default=0)
            wanted = known is None or known.generation < result.lease.number
            wanted = wanted and window not in self.lost
            if wanted and result.lease.number == newest and self.store.get(window, 0) < newest:
                return f"a result of sample {window} is there, and its features are not"
        if self.trainer.stage == "ended" and any(self.ledger[w].state != "freed" for w in range(WINDOWS)):
            return "the run ended before everything was trained and freed"
        if self.is_over() and set(self.store.items()) - self.orphans:
            return "features are left that nobody will delete"
        return ""

    def _tries(self, named: dict[str, Iterator[tuple[str, Callable[[World], None]]]]) -> Iterator[Action]:
        for who, found in named.items():
            for what, act in found:
                yield f"{who}: {what}", self._after(act)

    def _after(self, act: Callable[[World], None]) -> World:
        world = replace(
            self,
            book=_copy_of(self.book),
            store=dict(self.store),
            ledger=dict(self.ledger),
            trainer=replace(self.trainer),
            workers=[replace(worker) for worker in self.workers],
            orphans=set(self.orphans),
            lost=set(self.lost),
        )
        act(world)
        return world

    # the trainer

    def _trainer_steps(self) -> Iterator[tuple[str, Callable[[World], None]]]:
        trainer = self.trainer
        if trainer.stage == "start":
            yield "start", World._start
        if trainer.stage != "run":
            return
        if self.book.results(trainer.cursor):
            yield "record", World._record
        if trainer.cursor > self.book.committed:
            yield "commit", lambda w: w.book.commit(w.trainer.cursor)
        if trainer.window < WINDOWS and self._state(trainer.window) == "here":
            yield "train", World._train
        if self.checkpoint < trainer.window:
            yield "checkpoint", lambda w: setattr(w, "checkpoint", w.trainer.window)
        for window in range(self.checkpoint):
            row = self.ledger[window]
            if row.state == "trained":
                if self.store.get(window) == row.generation:
                    yield f"delete {window}", lambda w, n=window: w.store.pop(n)  # type: ignore[misc]
                else:
                    yield f"note {window} freed", lambda w, n=window: w._note_freed(n)  # type: ignore[misc]
        if self._all_freed():
            yield "end", World._end

    def _state(self, window: int) -> str:
        row = self.ledger.get(window)
        return row.state if row else "wanted"

    def _all_freed(self) -> bool:
        return all(self._state(window) == "freed" for window in range(WINDOWS))

    def _start(self) -> None:
        """The ledger goes back to the checkpoint; what is not here is wanted."""
        for window, row in list(self.ledger.items()):
            if window >= self.checkpoint and row.state == "trained":
                self.ledger[window] = replace(row, state="here")
        above = max((row.generation for row in self.ledger.values()), default=0)
        self.book.offer([batch(w) for w in range(WINDOWS) if self._state(w) == "wanted"], above=above)
        self.trainer = Trainer("run", window=self.checkpoint)

    def _record(self) -> None:
        result = self.book.results(self.trainer.cursor)[0]
        self.trainer.cursor = result.position
        window, number = result.lease.batch.first, result.lease.number
        row = self.ledger.get(window)
        if row is None or (row.generation < number and row.state == "here"):
            self.ledger[window] = Row(number, "here")
        elif row.generation < number:
            self.broken = f"sample {window} was trained, and came again"

    def _train(self) -> None:
        window = self.trainer.window
        row = self.ledger[window]
        if self.store.get(window) == row.generation:
            self.ledger[window] = replace(row, state="trained")
            self.trainer.window += 1
            return
        del self.ledger[window]  # lost: captured again
        self.book.commit(self.trainer.cursor)
        self.book.offer([batch(window)], above=row.generation)

    def _note_freed(self, window: int) -> None:
        self.ledger[window] = replace(self.ledger[window], state="freed")

    def _end(self) -> None:
        self.book.end(Ending(kind="finished", session=self.book.session))
        self.trainer.stage = "ended"

    def _kill_trainer(self) -> None:
        self.rules = replace(self.rules, trainer_kills=self.rules.trainer_kills - 1)
        self.trainer = Trainer()

    def _lose(self, window: int) -> None:
        self.rules = replace(self.rules, losses=self.rules.losses - 1)
        self.lost.add(window)
        del self.store[window]

    # a worker

    def _worker_steps(self, number: int) -> Iterator[tuple[str, Callable[[World], None]]]:
        def step(act: Callable[[World, Worker], None]) -> Callable[[World], None]:
            return lambda world: act(world, world.workers[number])

        worker = self.workers[number]
        if worker.stage == "dead":
            yield "is found dead, and started again", step(World._restart)
        elif worker.stage == "idle" and self.book.has_free:
            yield "take", step(World._take)
        elif worker.stage == "put":
            yield "put", step(World._put)
        elif worker.stage == "finish":
            yield "finish", step(World._finish)
        elif worker.stage == "surplus":
            yield "delete", step(World._delete_surplus)

    def _take(self, worker: Worker) -> None:
        worker.lease = self.book.take(worker.name)
        worker.stage = "put"

    def _put(self, worker: Worker) -> None:
        assert worker.lease is not None
        window, number = worker.lease.batch.first, worker.lease.number
        if self.rules.store_keeps_highest and self.store.get(window, 0) > number:
            self.book.give_back(worker.lease)  # does nothing: whoever put the higher one has the lease
            worker.lease, worker.stage = None, "idle"
            return
        self.store[window] = number
        worker.stage = "finish"

    def _finish(self, worker: Worker) -> None:
        assert worker.lease is not None
        if not self.rules.finish_is_fenced and not self.book.holds(worker.lease):
            book = self.book
            book.offer([worker.lease.batch])
            lost, book.number = book.number, worker.lease.number - 1
            again = book.take(worker.name)
            book.number = lost
            done = again is not None and book.finish(again, None) is not None
        else:
            done = self.book.finish(worker.lease, None) is not None
        worker.stage = "idle" if done else "surplus"
        worker.lease = None if done else worker.lease

    def _delete_surplus(self, worker: Worker) -> None:
        assert worker.lease is not None
        if self.store.get(worker.lease.batch.first) == worker.lease.number:
            del self.store[worker.lease.batch.first]
        worker.lease, worker.stage = None, "idle"

    def _kill_worker(self, number: int) -> None:
        self.rules = replace(self.rules, worker_kills=self.rules.worker_kills - 1)
        worker = self.workers[number]
        if worker.lease is not None and worker.stage in ("finish", "surplus"):
            self.orphans.add((worker.lease.batch.first, worker.lease.number))
        worker.lease, worker.stage = None, "dead"

    def _restart(self, worker: Worker) -> None:
        self.book.drop(worker.name)
        worker.name, worker.stage = worker.name + "'", "idle"

    def _misjudge(self, number: int) -> None:
        self.rules = replace(self.rules, false_deaths=self.rules.false_deaths - 1)
        self.book.drop(self.workers[number].name)


def _copy_of(book: QueueBook[None]) -> QueueBook[None]:
    """Containers and entries anew; what they hold never changes."""
    copied = QueueBook[None]()
    for name, value in vars(book).items():
        if name == "_entries":
            value = {key: copy.copy(entry) for key, entry in value.items()}
        elif name == "_held":
            value = {worker: dict(keys) for worker, keys in value.items()}
        setattr(copied, name, copy.copy(value))
    return copied
