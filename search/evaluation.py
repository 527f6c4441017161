"""One evaluation: sample a candidate on growing shares of a bank and score it, stopping early when it is clearly worse."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, cat, linspace

from ..core.checks import check_finite
from ..core.identity import identify
from .config import SearchConfig
from .objectives import Objective, Score, score_or_worst
from .paths import SamplingPath, Trajectory
from .space import Candidate
from .store import Record, Rung, Store

NAN_REMEDY = "Use float32 or bfloat16 for the model, or another sampler. Nothing of this run was stored."
SEARCH, HOLDOUT = "search", "holdout"
WATCHED = 8  # pairs whose teacher states are kept in memory for the dynamic programming start


def rung_sizes(pairs: int, halving: bool) -> tuple[int, ...]:
    """Return after how many pairs an evaluation is looked at: a quarter, half, all."""
    return (pairs // 4, pairs // 2, pairs) if halving and pairs >= 8 else (pairs,)


def limits_of(record: Record | None, margin: float, rungs: int) -> tuple[float, ...]:
    """Return the score above which a candidate is dropped at each rung, given the incumbent's record."""
    if record is None or len(record) < rungs:
        return (math.inf,) * rungs
    # The margin shrinks as the shares grow: a quarter of the pairs is a noisier estimate than half of them.
    shrink = [margin / (2**i) for i in range(rungs - 1)]
    return (*(r.score + m * abs(r.score) for r, m in zip(record, shrink)), math.inf)


def judged(record: Record, limits: Sequence[float], rungs: int) -> tuple[float, Record, bool]:
    """Return (score, the rungs that count, whether they suffice) of a record under `limits`.

    A stored record may have been taken further under softer limits: it is cut where these limits cut it, so that a
    resumed search decides as the first one did.
    """
    for i, (rung, limit) in enumerate(zip(record, limits)):
        if not math.isfinite(rung.score):
            return math.inf, record[: i + 1], True
        if rung.score > limit:
            return math.inf, record[: i + 1], True
    return record[-1].score, record, len(record) == rungs


def evaluate(
    path: SamplingPath, score: Score, pairs: Sequence[int], sizes: Sequence[int], candidate: Candidate,
    limits: Sequence[float],
) -> Record:  # fmt: skip
    """Sample and score `candidate`; returns one rung for each share of `pairs` it got to."""
    rungs: list[Rung] = []
    parts: list[Tensor] = []
    done = 0
    for size, limit in zip(sizes, limits):
        begin, calls = time.perf_counter(), path.calls
        parts.append(
            path.sample(candidate.sigmas, pairs[done:size], candidate.layer_masks(), reuse=candidate.reuse_spans())
        )
        value = score_or_worst(score, cat(parts))
        rungs.append(Rung(size, value, time.perf_counter() - begin, path.calls - calls))
        done = size
        if value > limit or not math.isfinite(value):
            break
    return tuple(rungs)


@dataclass
class PairBank:
    """A set of pairs with the model's own many-step result on them, sampled once and kept in the store."""

    name: str
    path: SamplingPath
    pairs: list[int]
    teacher_sigmas: Tensor
    store: Store
    begin: Callable[[], None] = lambda: None  # called before a many-step run, which takes long

    @property
    def key(self) -> str:
        return f"{self.name} {len(self.pairs)}"

    def teacher(self) -> Tensor:
        """Return the teacher's latents (n, C, H, W)."""
        known = self.store.tensor(f"teacher {self.key}")
        if known is None:
            head = self.store.tensor(f"teacher head {self.key}")
            done = 0 if head is None else len(head)
            self.begin()
            rest = self.path.sample(self.teacher_sigmas, self.pairs[done:])
            known = rest if head is None else cat([head, rest])
            check_finite("the model's own samples", known, NAN_REMEDY)
            self.store.put_tensor(f"teacher {self.key}", known)
        return known

    def watched(self) -> tuple[Trajectory, Tensor]:
        """Return the teacher's states on the first pairs, which are not stored, and its result there, which is."""
        watch = Trajectory([], [], [])
        self.begin()
        final = self.path.sample(self.teacher_sigmas, self.pairs[:WATCHED], watch=watch)
        check_finite("the model's own samples", final, NAN_REMEDY)
        self.store.put_tensor(f"teacher head {self.key}", final)
        return watch, final


def teacher_sigmas(table: Tensor, steps: int) -> Tensor:
    """Return the teacher's schedule: `steps` levels evenly spaced over the model's table, both ends included, then 0."""
    index = linspace(len(table) - 1, 0, min(steps, len(table))).round().long()
    return cat([table[index].float(), table.new_zeros(1).float()])


def banks(path: SamplingPath, config: SearchConfig, store: Store) -> dict[str, PairBank]:
    """Return the search bank and the held-out bank, which share no pair."""
    sigmas = Tensor(config.full) if config.full else teacher_sigmas(path.table(), config.teacher_steps)
    held = range(config.pairs, config.pairs + config.holdout_pairs)
    return {
        SEARCH: PairBank(SEARCH, path, list(range(config.pairs)), sigmas, store),
        HOLDOUT: PairBank(HOLDOUT, path, list(held), sigmas, store),
    }


@dataclass
class Task:
    """Everything a worker needs to evaluate: made once in each worker by a factory, because a model is not sent around."""

    path: SamplingPath
    objective: Objective
    config: SearchConfig
    rerank: Objective | None = None

    def __post_init__(self) -> None:
        self.rerank = self.rerank or self.objective
        self.scores: dict[str, Score] = {}
        self.warnings: list[str] = []

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a store belongs to, as JSON: everything but the budget that its evaluations depend on.

        Its "goal" is None for an objective that cannot be named, whose evaluations must not be used again.
        """
        assert self.rerank is not None
        sampling, goals = self.path.identity(), identify(self.objective, self.rerank)
        if sampling.get("unnamed"):
            self.warnings.append(
                f"Slipstream cannot compare {', '.join(sampling['unnamed'])} with those of an earlier search: it is found again by "
                "what it samples."
            )
        if goals.unnamed:
            self.warnings.append(goals.warning)
        goal = None if goals.unnamed else goals.digest[:16]
        return {**sampling, "objective": self.objective.id, "goal": goal, "config": self.config.identity()}

    def score(self, bank: PairBank) -> Score:
        """Return the score on a bank: the objective while searching, the ranking objective on held-out pairs."""
        if bank.key not in self.scores:
            objective = self.objective if bank.name == SEARCH else self.rerank
            assert objective is not None
            self.scores[bank.key] = objective.prepare(bank)
        return self.scores[bank.key]

    def evaluate(self, bank: PairBank, candidate: Candidate, limits: Sequence[float]) -> Record:
        sizes = rung_sizes(len(bank.pairs), self.config.halving and bank.name == SEARCH)
        return evaluate(self.path, self.score(bank), bank.pairs, sizes, candidate, limits)


TaskFactory = Callable[[], Task]
