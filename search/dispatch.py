"""Who evaluates what: this process, the workers of an executor, or another process on the same store."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from .evaluation import SEARCH, PairBank, Task, TaskFactory, judged
from .space import Candidate
from .store import Record, Store
from .workers import Executor, evaluate_in_worker, worker_count

logger = logging.getLogger(__name__)
RETRIES = 2
POLL = 0.02  # seconds between looks at what another process is doing
QUIET = 5.0  # seconds of waiting for another process without a word


class Dispatcher:
    """Gets records of candidates; `evaluated` counts those that this run made itself.

    Args:
        task, store, job: what is evaluated, where it is kept, under which name workers keep their model.
        executor, factory: None evaluates here.
        waiting: called while another process evaluates what is needed; may raise to stop.
    """

    def __init__(
        self, task: Task, store: Store, job: str, executor: Executor | None, factory: TaskFactory | None,
        waiting: Callable[[Candidate], None],
    ) -> None:  # fmt: skip
        self.task, self.store, self.job = task, store, job
        self.executor, self.factory, self.waiting = executor, factory, waiting
        self.flying: dict[tuple[str, str], Future[Record]] = {}
        self.failures: dict[tuple[str, str], int] = {}
        self.evaluated = 0

    def obtain(self, bank: PairBank, candidates: Sequence[Candidate], limits: tuple[float, ...], rungs: int) -> Record:
        """Return a sufficient record of the first candidate; idle workers and other processes take the next ones."""
        wanted = candidates[0]
        waits = itertools.count(1)
        while True:
            record = self.store.get(bank.key, wanted.key)
            if record is not None and judged(record, limits, rungs)[2]:
                return record
            self._collect()
            if self.executor is not None:
                self._fly(bank, candidates, limits, rungs)
                if (bank.key, wanted.key) in self.flying:
                    self._land((bank.key, wanted.key))
                    continue
            else:
                free = next((c for c in candidates if self._mine(bank, c, limits, rungs)), None)
                if free is not None:
                    self.evaluated += 1
                    self.store.put(bank.key, free.key, self.task.evaluate(bank, free, limits))
                    continue
            if next(waits) == round(QUIET / POLL):
                worker = self.store.claimant(bank.key, wanted.key)
                logger.info("Waiting for process %s, which evaluates what this search needs next.", worker)
            time.sleep(POLL)
            self.store.forget(bank.key, wanted.key)
            self.waiting(wanted)

    def _mine(self, bank: PairBank, candidate: Candidate, limits: tuple[float, ...], rungs: int) -> bool:
        record = self.store.get(bank.key, candidate.key)
        done = record is not None and judged(record, limits, rungs)[2]
        return not done and self.store.claim(bank.key, candidate.key)

    def _fly(self, bank: PairBank, candidates: Sequence[Candidate], limits: tuple[float, ...], rungs: int) -> None:
        """Send candidates to idle workers, in order."""
        assert self.executor is not None
        objective = self.task.objective if bank.name == SEARCH else self.task.rerank
        assert objective is not None
        for candidate in candidates:
            if len(self.flying) >= worker_count(self.executor):
                return
            key = (bank.key, candidate.key)
            if key in self.flying or not self._mine(bank, candidate, limits, rungs):
                continue
            teacher = bank.teacher() if objective.needs_teacher else None
            self.flying[key] = self.executor.submit(
                evaluate_in_worker, self.factory, self.job, bank.name, teacher, candidate, limits
            )

    def _land(self, key: tuple[str, str]) -> None:
        """Wait for one evaluation and store it; one that failed may be sent again, but not for ever."""
        try:
            record = self.flying.pop(key).result()
        except Exception:
            self.failures[key] = self.failures.get(key, 0) + 1
            if self.failures[key] > RETRIES:
                raise
            logger.warning("An evaluation failed in its worker: it is run again.", exc_info=True)
            return
        self.evaluated += 1
        self.store.put(*key, record)

    def _collect(self) -> None:
        """Store what workers have finished ahead of need."""
        for key in [key for key, future in self.flying.items() if future.done()]:
            self._land(key)

    def abandon(self) -> None:
        """Store what is finished and drop what has not begun: the end of a search, by its budget or by an exception."""
        for key, future in list(self.flying.items()):
            if not future.cancel() and future.done() and future.exception() is None:
                self.store.put(*key, self.flying.pop(key).result())
