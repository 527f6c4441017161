"""search(): runs a strategy against a budget, stores every evaluation, ranks the best on held-out pairs, makes the schedule."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.denoiser import FLOW, VE
from ..core.lifetime import weakly
from ..core.progress import Step
from .asks import Ask, Strategy
from .coefficients import Course, Weights, followed_weights, planned_weights
from .comparison import as_schedule, calls_per_sample
from .config import SearchConfig
from .dispatch import Dispatcher
from .evaluation import HOLDOUT, NAN_REMEDY, SEARCH, WATCHED, Task, TaskFactory, banks, judged, limits_of, rung_sizes
from .objectives import Objective, Paired
from .paths import SamplingPath, Trajectory
from .schedule import Schedule
from .space import DIGITS, Candidate, Genome, Space, candidate_of
from .starts import from_trajectory, starting_genomes
from .store import Record, Store
from .strategies import Evolution, auto, coordinate, evolve, fills, published
from .workers import Executor


@dataclass(frozen=True)
class SearchStep(Step):
    """Progress of a search: `best` and `history` (evaluation number, score of each improvement), stock scores by name."""

    best: float = math.inf
    score: float = math.inf
    history: tuple[tuple[int, float], ...] = ()
    baselines: dict[str, float] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    evaluated: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The best schedule with what led to it.

    `baselines` and `finalists` are (name or levels) -> score on held-out pairs; `history` as in `SearchStep`;
    `evaluations`, `calls`, `seconds` are what the search spent, those of earlier runs on the same store included.
    `profile` is (network calls, relative distance to the full run) of the planned schedule of each budget, for a search with
    `computed`.
    """

    schedule: Schedule
    history: tuple[tuple[int, float], ...]
    baselines: dict[str, float]
    finalists: tuple[tuple[Candidate, float], ...]
    evaluations: int
    calls: int
    seconds: float
    evaluated_now: int
    warnings: tuple[str, ...]
    profile: tuple[tuple[int, float], ...] = ()


# The name of the start that dynamic programming finds.
PLANNED = "dynamic programming"
# Finalists whose coefficients are fitted once more along their own samples, and over how many calls.
FOLLOWED, ORDERS = 3, (2, 3)
# Budgets of network calls whose error a search of call reuse also tells.
PROFILE = (3, 4, 5, 6, 8, 10, 12, 16)


def _given(name: str, schedule: Tensor | Schedule, space: Space) -> Candidate:
    """Return a given schedule as a candidate; raises ValueError for one that cannot be sampled in `space`."""
    made = as_schedule(schedule)
    if made.masks:
        raise ValueError(
            f"Expected schedules without layer masks to begin from, but {name!r} has some. Give its sigmas alone."
        )
    top = space.table[-1]
    if made.levels[0] > top * 1.001:
        raise ValueError(
            f"Expected schedules of this model to begin from, at most sigma {top:.4g}, but {name!r} begins at {made.levels[0]:.4g}. "
            "It was made for another model."
        )
    if (made.levels[-1] == 0) != bool(space.tail):
        raise ValueError(
            f"Expected schedules that end {'at' if space.tail else 'above'} 0 to begin from, but {name!r} ends at "
            f"{made.levels[-1]:.4g}. Give one that ends as the search does."
        )
    return candidate_of(made.levels, reuse=made.reuse)


class Exhausted(Exception):  # noqa: N818 - the end of a budget is no error
    """The budget is spent."""


def search(
    path: SamplingPath, config: SearchConfig, objective: Objective | None = None, rerank: Objective | None = None,
    store: str | pathlib.Path | Callable[[dict[str, Any]], pathlib.Path] | None = None, executor: Executor | None = None,
    factory: TaskFactory | None = None, callback: Callable[[Step], None] | None = None,
    given: Mapping[str, Tensor | Schedule] | None = None,
) -> SearchResult:  # fmt: skip
    """Find the best schedule for `path` (AutoDiffusion, arXiv 2309.10438, with better starts, strategy and statistics).

    Args:
        path: how the user samples: model, sampler, cfg, conditioning, size.
        config: what to search and for how long.
        objective: what "better" means; None = paired distance to the model's own many-step result.
        rerank: the objective for the last ranking on held-out pairs; None = the same.
        store: SQLite file that keeps every evaluation, or a function that names it from `Task.identity`. The same call again
            resumes.
        executor: `concurrent.futures`-like; needs `factory`, which makes the same `Task` in each worker.
        callback: gets a `SearchStep` after each evaluation; what it raises ends the search, and the store keeps all.
        given: schedules to begin from, such as a distilled model's own list or the result of a search with fewer calls. Those
            that make no more calls than the search may are ranked with the stock schedules: the result is no worse than they are.

    Raises ValueError for a store of another job, an objective that is never finite, a sampler that ignores sigmas, and given
    schedules of another model.
    """
    if executor is not None and factory is None:
        raise ValueError(
            "Expected `factory` with `executor`, but got none. Give a function that builds the Task in a worker."
        )
    objective = objective or Paired()
    task = Task(path, objective, config, rerank)
    place = store(task.identity) if callable(store) else store
    with Store(None if task.identity["goal"] is None else place, task.identity, own=callable(store)) as opened:
        return Search(task, opened, executor, factory, callback, given).run()


class Search:
    """One run of one job; see `search`."""

    def __init__(
        self, task: Task, store: Store, executor: Executor | None = None, factory: TaskFactory | None = None,
        callback: Callable[[Step], None] | None = None, given: Mapping[str, Tensor | Schedule] | None = None,
    ) -> None:  # fmt: skip
        self.task, self.config, self.path, self.store = task, task.config, task.path, store
        self.callback = callback
        self.job = hashlib.sha256(json.dumps(task.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.banks = banks(task.path, task.config, store)
        for bank in self.banks.values():
            bank.begin = weakly(self._teaching)
        self.dispatch = Dispatcher(task, store, self.job, executor, factory, weakly(self._waiting))
        costs = {layer.name: layer.cost for layer in self.path.layers()} if self.config.layers else {}
        fitted = self.config.fits(task.identity["sampler"])
        self.space = Space(self.path.table(), self.config, costs, weakly(self._planned) if fitted else None)
        self.counted: dict[str, Record] = {}
        self.scores: dict[str, tuple[float, Candidate]] = {}
        self.history: list[tuple[int, float]] = []
        self.seconds, self.calls = 0.0, 0
        self.warnings = [*task.warnings]
        self.given = {name: _given(name, schedule, self.space) for name, schedule in (given or {}).items()}
        self.stock: dict[str, Tensor] = {}
        self.baselines: dict[str, Candidate] = {}
        self.stock_scores: dict[str, float] = {}
        self.watched: tuple[Trajectory, Tensor] | None = None
        self.planned: Genome | None = None

    def run(self) -> SearchResult:
        """Search, rank on held-out pairs, and return the result."""
        try:
            self.stock = {
                name: sigmas
                for name, sigmas in self.path.stock(self.config.network_steps).items()
                if len(sigmas) == self.config.network_steps + 1
            }
            allowed = {name: c for name, c in self.given.items() if len(c.knots) - 1 <= self.config.network_steps}
            self.baselines = {**{name: candidate_of(sigmas) for name, sigmas in self.stock.items()}, **allowed}
            self._teaching()
            starts = self._starts(self.space, self.stock)
            self.planned = starts.get(PLANNED)
            self._search(self._strategy(list(starts.values())), starts)
            return replace(self._result(*self._final()), profile=self._profile())
        finally:
            self.dispatch.abandon()

    def _starts(self, space: Space, stock: Mapping[str, Tensor]) -> dict[str, Genome]:
        """Return where a search in `space` begins, by name: stock schedules and dynamic programming on a teacher's run."""
        starts = starting_genomes(space, stock)
        name = f"start dynamic programming {len(self.banks[SEARCH].pairs)} {space.config.steps}"
        if space.reused or space.fit:
            name += f" {'fitted' if space.fit else 'computed'} {space.config.network_steps}"
        known = self.store.tensor(name)
        if known is None:
            noise_space = FLOW if self.task.identity["model"].get("prediction") == "flow" else VE
            genome = from_trajectory(space, *self._watched(), noise_space)
            known = Tensor(list(genome or ()))
            self.store.put_tensor(name, known)
        if len(known):
            starts[PLANNED] = space.repair([int(i) for i in known])
        for each, candidate in self.given.items():
            levels = candidate.knots[:-1] if space.tail else candidate.knots
            genome = space.resized(tuple(space.index_of(s) for s in levels), space.count)
            starts |= {} if genome in starts.values() else {each: genome}
        return starts or {"uniform": space.repair([space.top / (i + 1) for i in range(space.count)])}

    def _watched(self) -> tuple[Trajectory, Tensor]:
        """Return the teacher's run on the first pairs, sampled once."""
        self.watched = self.watched or self.banks[SEARCH].watched()
        return self.watched

    @functools.cached_property
    def course(self) -> Course:
        """The teacher's run that coefficients are fitted to; kept in the store, so that a resumed search finds the same ones."""
        name = f"course {self.banks[SEARCH].key}"
        known = self.store.tensor(name)
        if known is None:
            known = Course.of(*self._watched()).pack()
            self.store.put_tensor(name, known)
        return Course.unpack(known)

    def _planned(self, levels: Sequence[float]) -> Weights:
        return planned_weights(self.course, levels, 2)

    def _followed(self, candidate: Candidate, order: int) -> Candidate:
        """Return a candidate with coefficients fitted along its own samples."""
        name = f"weights {order} {candidate.key}"
        known = self.store.tensor(name)
        if known is None:
            pairs = self.banks[SEARCH].pairs[:WATCHED]
            found = followed_weights(self.path, self.course, candidate.knots, order, pairs)
            known = torch.tensor([[*w, *[0.0] * (order - len(w))] for w in found])
            self.store.put_tensor(name, known)
        weights = tuple(tuple(round(w, DIGITS) for w in row[: i + 1]) for i, row in enumerate(known.tolist()))
        return replace(candidate, weights=weights)

    def _longer(self) -> list[Genome]:
        """Return schedules of one step more, for masks to pay for; none when the table has no room for it."""
        config = replace(self.config, steps=self.config.steps + 1)
        try:
            space = Space(self.path.table(), config, self.space.costs)
        except ValueError:
            return []
        return list(dict.fromkeys(self._starts(space, self.path.stock(config.steps)).values()))

    def _strategy(self, starts: Sequence[Genome]) -> Strategy:
        import random

        config, space = self.config, self.space
        if config.strategy == "published":
            return published(space, config.seed)
        if config.strategy == "coordinate":
            return coordinate(space, starts, config.seed, config.restarts)
        if config.strategy == "evolution":
            rng = random.Random(f"{config.seed} evolution")
            genomes = [*starts, *(space.random(rng) for _ in range(20))]
            first = [(g, (), fill) for g in genomes for fill in fills(space, g)]
            return evolve(space, first, rng, Evolution(generations=10**6))
        return auto(space, starts, config.seed, config.restarts, self._longer() if space.costs else ())

    def _search(self, strategy: Strategy, starts: dict[str, Genome]) -> None:
        names = {self.space.candidate(g).key: n for n, g in starts.items()}
        try:
            ask = next(strategy)
            first = True
            while True:
                scores = self._resolve(ask, names)
                if first:
                    self._check_first(ask, scores)
                first = False
                ask = strategy.send(scores)
        except (Exhausted, StopIteration):
            return

    def _check_first(self, ask: Ask, scores: Sequence[float]) -> None:
        if all(not math.isfinite(s) for s in scores):
            raise ValueError(
                f"Expected `objective` {self.task.objective.id!r} to give a finite score for at least one of {len(scores)} "
                "schedules, but got none. The model's samples or the features are NaN: try float32, or another objective."
            )
        if len({c.levels for c in ask.candidates}) > 1 and len(set(scores)) == 1:
            raise ValueError(
                f"Expected different scores for {len(scores)} different schedules, but got {scores[0]:.6g} for all. "
                "The sampler ignores its sigmas (some choose their own steps), or the objective is constant: use another one."
            )

    # ------------------------------------------------------------------------------------------------ evaluation

    def _resolve(self, ask: Ask, names: dict[str, str]) -> list[float]:
        """Return scores of the ask's candidates, in order, up to the first one that beats its incumbent."""
        bank = self.banks[SEARCH]
        rungs = len(rung_sizes(len(bank.pairs), self.config.halving))
        incumbent = self.counted.get(ask.beat.key) if ask.beat is not None else None
        target = self.scores[ask.beat.key][0] if ask.beat is not None and ask.beat.key in self.scores else -math.inf
        limits = limits_of(incumbent, self.config.margin, rungs)
        if ask.probe:  # above any limit: stop after the first share
            limits = (-math.inf,) * (rungs - 1) + (math.inf,)
        scores: list[float] = []
        for i, candidate in enumerate(ask.candidates):
            if candidate.key not in self.counted:
                self._check_budget()
            record = self.dispatch.obtain(bank, ask.candidates[i:], limits, rungs)
            score, used, _ = judged(record, limits, rungs)
            if ask.probe:
                scores.append(used[0].score)
                self._spend(candidate, used)
                self._report("search", candidate, math.inf)
                continue
            self._count(candidate, score, used, names.get(candidate.key))
            scores.append(score)
            if ask.beat is not None and score < target:
                break
        return scores

    def _check_budget(self) -> None:
        config = self.config
        for spent, allowed in (
            (len(self.counted), config.evaluations),
            (self.seconds, config.seconds),
            (self.calls, config.calls),
        ):
            if allowed is not None and spent >= allowed:
                raise Exhausted

    def _count(self, candidate: Candidate, score: float, used: Record, name: str | None) -> None:
        new = candidate.key not in self.counted
        self._spend(candidate, used)
        if name and name in self.stock:
            self.stock_scores[name] = min(score, self.stock_scores.get(name, math.inf))
        best = min((s for s, _ in self.scores.values()), default=math.inf)
        if score < self.scores.get(candidate.key, (math.inf, candidate))[0] or new:
            self.scores[candidate.key] = (score, candidate)
        if score < best:
            self.history.append((len(self.counted), score))
        if new:
            self._report("search", candidate, score)

    def _spend(self, candidate: Candidate, used: Record) -> None:
        known = self.counted.get(candidate.key, ())
        for rung in used[len(known) :]:
            self.seconds += rung.seconds
            self.calls += rung.calls
        if len(used) > len(known):
            self.counted[candidate.key] = used

    # ---------------------------------------------------------------------------------------------------- result

    def _final(self) -> tuple[list[tuple[Candidate, float]], dict[str, float]]:
        """Score the best finalists and the exact stock schedules on held-out pairs."""
        complete = [(s, c) for s, c in self.scores.values() if math.isfinite(s)]
        ranked = [c for _, c in sorted(complete, key=lambda pair: (pair[0], pair[1].key))]
        chosen = self._apart(ranked)
        # A masked schedule has to beat the best unmasked one, so at least one of those is always ranked too.
        chosen += [c for c in ranked if not c.masks and c not in chosen][: 0 if any(not c.masks for c in chosen) else 1]
        if self.space.fit:
            # The plan too: levels that were moved for the search pairs lose on others now and then.
            planned = [] if self.planned is None else [self._plan(self.space, self.planned)]
            chosen += [
                self._followed(c, order) for c in dict.fromkeys([*chosen[:FOLLOWED], *planned]) for order in ORDERS
            ]
        bank = self.banks[HOLDOUT]
        pool = list(dict.fromkeys([*chosen, *self.baselines.values()]))
        scores: dict[str, float] = {}
        for i, candidate in enumerate(pool):
            record = self.dispatch.obtain(bank, pool[i:], (math.inf,), 1)
            scores[candidate.key] = record[-1].score
            self._report("final", candidate, record[-1].score, i + 1, len(pool))
        return [(c, scores[c.key]) for c in chosen], {n: scores[c.key] for n, c in self.baselines.items()}

    def _plan(self, space: Space, genome: Genome) -> Candidate:
        return space.candidate(genome, (), fills(space, genome)[0])

    def _profile(self) -> tuple[tuple[int, float], ...]:
        """Return what each budget of calls comes to without a search, on held-out pairs: where the knee is."""
        if self.config.computed is None:
            return ()
        bank, name = self.banks[HOLDOUT], f"typical profile {self.banks[SEARCH].key}"
        known = self.store.tensor(name)
        if known is None:
            full, found = bank.teacher()[:WATCHED], []
            budgets = sorted({n for n in PROFILE if n < self.config.steps} | {self.config.computed})
            for i, calls in enumerate(budgets):
                space = Space(self.path.table(), replace(self.config, computed=calls), fit=self.space.fit)
                genome = self._starts(space, {}).get(PLANNED)
                if genome is None:
                    continue
                planned = self._plan(space, genome)
                self._report("final", planned, math.inf, i + 1, len(budgets))
                samples = self.path.sample(planned.sigmas, bank.pairs[: len(full)], reuse=planned.reuse_spans())
                # The median: one sample that ends as another image would outweigh all the others in a mean.
                errors = (samples - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
                found.append([calls, float(errors.median())])
            known = torch.tensor(found)
            self.store.put_tensor(name, known)
        return tuple((int(calls), error) for calls, error in known.reshape(-1, 2).tolist())

    def _apart(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Return the first `finalists` candidates that are no near copies of each other, filled up with copies.

        Near copies share the luck of the search pairs: to rank them on others would tell nothing.
        """
        near = len(self.space.table) // 50
        genomes: dict[Candidate, Genome] = {}
        for candidate in ranked:
            genome = tuple(self.space.index_of(s) for s in candidate.levels if s > 0)
            copies = (
                (len(g), c.masks, c.reuse) == (len(genome), candidate.masks, candidate.reuse)
                and all(abs(a - b) <= near for a, b in zip(g, genome))
                for c, g in genomes.items()
            )  # fmt: skip
            if not any(copies):
                genomes[candidate] = genome
            if len(genomes) == self.config.finalists:
                break
        rest = [c for c in ranked if c not in genomes]
        return [*genomes, *rest][: self.config.finalists]

    def _result(self, finalists: list[tuple[Candidate, float]], baselines: dict[str, float]) -> SearchResult:
        order = sorted(finalists, key=lambda pair: (pair[1], bool(pair[0].masks), pair[0].key))
        winner, value = order[0]
        name = ""
        plain = min((s for c, s in finalists if not c.masks), default=math.inf)
        if winner.masks and value >= plain:
            winner, value = next((c, s) for c, s in order if not c.masks)
        allowed = [n for n in baselines if n not in self.stock or self.space.may_begin(self.baselines[n].levels[0])]
        best = min(allowed, key=lambda n: baselines[n], default="")
        if best and baselines[best] < value:
            name = best
            winner, value = self.baselines[name], baselines[name]
            self.warnings.append(
                f"No searched schedule was better than {name!r} on held-out pairs: that one is returned."
            )
        if self.space.count == self.space.pinned and not self.space.reused and not self.space.fit:
            self.warnings.append("One step with the first level pinned leaves nothing to search.")
        if self.config.layers and not winner.masks:
            self.warnings.append("No layer mask was better than the full network at this cost: none is returned.")
        if self.store.problem:
            self.warnings.append(self.store.problem)
        if not math.isfinite(value):
            raise ValueError(
                f"Expected `objective` {self.task.objective.id!r} to give a finite score on held-out pairs, but got {value}. "
                f"{NAN_REMEDY}"
            )
        schedule = self._schedule(winner, value, baselines, name)
        return SearchResult(
            schedule, tuple(self.history), baselines, tuple(order), len(self.counted), self.calls, self.seconds,
            self.dispatch.evaluated, tuple(self.warnings),
        )  # fmt: skip

    def _schedule(self, winner: Candidate, value: float, baselines: dict[str, float], name: str) -> Schedule:
        identity = self.task.identity
        assert self.task.rerank is not None
        nfe = calls_per_sample(self.path, winner)
        index = [self.space.index_of(s) for s in winner.levels if s > 0]
        steps = f"{nfe} calls in {winner.steps} steps" if winner.reuse else f"{winner.steps} steps"
        return Schedule(
            levels=winner.levels,
            model=identity["model"],
            sampler=identity["sampler"],
            cfg_scale=identity["cfg"],
            nfe=nfe,
            name=name or f"searched for {identity['model']['name'] or 'this model'}, {steps}",
            timesteps=tuple(float(i) for i in index),
            masks=winner.layer_masks(),
            reuse=winner.reuse_spans(),
            objective={
                "id": self.task.rerank.id,
                "value": value,
                "baselines": {n: s for n, s in baselines.items() if math.isfinite(s)},
            },
            search={
                "method": self.config.strategy,
                "objective": self.task.objective.id,
                "evaluations": len(self.counted),
                "calls": self.calls,
                "seconds": round(self.seconds, 2),
                "seed": self.config.seed,
                "pairs": self.config.pairs,
                "holdout_pairs": self.config.holdout_pairs,
                "job": self.job,
            },
            # What became of this run's store is no property of the schedule, which is saved and shared.
            warnings=tuple(text for text in self.warnings if text != self.store.problem),
        )

    # -------------------------------------------------------------------------------------------------- progress

    def _teaching(self) -> None:
        self._report("teacher", Candidate((1.0, 0.0)), math.inf)

    def _waiting(self, candidate: Candidate) -> None:
        """Let the callback stop the search while another process evaluates what is needed next."""
        self._report("search", candidate, math.inf)

    def _report(self, phase: str, candidate: Candidate, score: float, index: int = 0, total: int = 0) -> None:
        if self.callback is not None:
            self.callback(self._step(phase, candidate, score, index, total))

    def _step(self, phase: str, candidate: Candidate, score: float, index: int = 0, total: int = 0) -> SearchStep:
        best = self.history[-1][1] if self.history else math.inf
        parts = [
            spent / allowed
            for spent, allowed in (
                (len(self.counted), self.config.evaluations),
                (self.seconds, self.config.seconds),
                (self.calls, self.config.calls),
            )
            if allowed is not None
        ]
        count = self.config.evaluations or 1000
        done = min(count, math.ceil(max(parts) * count))
        if phase == "final":
            done, count = index, total
        return SearchStep(
            phase, done, count, candidate.levels[0], None, best, score, tuple(self.history),
            dict(self.stock_scores), candidate.levels, len(self.counted),
        )  # fmt: skip
