"""compare(): "is it better than karras?", for any number of schedules on the same pairs, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.checks import check_integer
from ..core.progress import Reporter, Step
from .config import SearchConfig
from .evaluation import PairBank, teacher_sigmas
from .objectives import Objective, Paired, score_or_worst
from .paths import SamplingPath
from .schedule import Schedule
from .space import Candidate, candidate_of
from .store import Store

# Two-sided 95 % points of Student's t for 1, 2, 3 ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    """A mean over repeats with its 95 % interval: `half` is infinite for a single repeat."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" +- {self.half:.2g}" if math.isfinite(self.half) else "")


def interval(values: Sequence[float]) -> Interval:
    """Return mean and Student's 95 % interval of independent repeats."""
    n = len(values)
    mean = sum(values) / n
    if n < 2 or not math.isfinite(mean):
        return Interval(mean, math.inf)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, T95[min(n - 2, len(T95) - 1)] * deviation / math.sqrt(n))


@dataclass(frozen=True)
class Row:
    """One schedule's results: denoiser calls per sample, and an interval for each objective."""

    name: str
    levels: tuple[float, ...]
    nfe: int
    scores: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the first objective, best first."""

    rows: tuple[Row, ...]
    objectives: tuple[str, ...]
    pairs: int
    repeats: int

    def table(self) -> str:
        """Return the results as a text table."""
        head = ["schedule", "steps", "calls", *self.objectives]
        body = [
            [r.name, str(len(r.levels) - 1), str(r.nfe), *(str(r.scores[o]) for o in self.objectives)]
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *body]]
        note = f"{self.pairs} pairs x {self.repeats} repeats; lower is better; +- is a 95 % interval over the repeats."
        return "\n".join([*lines, note])


def compare(
    path: SamplingPath,
    schedules: Mapping[str, Tensor | Schedule],
    objectives: Sequence[Objective] | None = None,
    pairs: int = 16,
    repeats: int = 3,
    first_pair: int = 1_000_000,
    teacher_steps: int = SearchConfig.teacher_steps,
    callback: Callable[[Step], None] | None = None,
) -> Comparison:
    """Score schedules of any length on the same pairs, none of which a search has seen.

    Args:
        path: how the user samples.
        schedules: sigmas, or `Schedule`s whose layer masks are applied.
        objectives: None = paired distance to the many-step result.
        pairs, repeats: each score is computed `repeats` times, on `pairs` fresh pairs each.
        first_pair: number of the first pair; the default is beyond those of any search.
        callback: called when many steps of some pairs begin (phase "teacher", not counted), and after each schedule in each repeat.

    Raises ValueError for an empty mapping or sigmas that do not descend.
    """
    check_integer("pairs", pairs, 1, 100_000)
    check_integer("repeats", repeats, 1, 100)
    if not schedules:
        raise ValueError("Expected at least one schedule to compare, but got none. Connect SIGMAS.")
    objectives = list(objectives or [Paired()])
    made = {name: as_schedule(schedule) for name, schedule in schedules.items()}
    candidates = {name: candidate_of(s.levels, s.masks, s.reuse) for name, s in made.items()}
    report = Reporter(len(candidates) * repeats, callback)
    values: dict[tuple[str, str], list[float]] = {}
    nfe: dict[str, int] = {}
    sigmas = teacher_sigmas(path.table(), teacher_steps)

    def teaching() -> None:
        if callback is not None:
            callback(Step("teacher", report.index, report.total, float(sigmas[0])))

    for repeat in range(repeats):
        numbers = list(range(first_pair + repeat * pairs, first_pair + (repeat + 1) * pairs))
        bank = PairBank(f"compare {repeat}", path, numbers, sigmas, Store())
        bank.begin = teaching
        scores = {o.id: o.prepare(bank) for o in objectives}
        for name, candidate in candidates.items():
            nfe.setdefault(name, calls_per_sample(path, candidate))
            latents = path.sample(candidate.sigmas, numbers, candidate.layer_masks(), reuse=candidate.reuse_spans())
            for key, score in scores.items():
                values.setdefault((name, key), []).append(score_or_worst(score, latents))
            report("compare", candidate.levels[0])
    rows = [
        Row(name, c.levels, nfe[name], {o.id: interval(values[name, o.id]) for o in objectives})
        for name, c in candidates.items()
    ]
    rows.sort(key=lambda row: row.scores[objectives[0].id].mean)
    return Comparison(tuple(rows), tuple(o.id for o in objectives), pairs, repeats)


def calls_per_sample(path: SamplingPath, candidate: Candidate) -> int:
    """Return the denoiser calls of one sample: what schedules are compared at."""
    begin = path.evaluations
    path.sample(candidate.sigmas, [0], candidate.layer_masks(), reuse=candidate.reuse_spans())
    return path.evaluations - begin


def as_schedule(schedule: Tensor | Schedule) -> Schedule:
    """Return sigmas as a schedule of no model in particular; raises ScheduleError for ones that do not descend."""
    return schedule if isinstance(schedule, Schedule) else Schedule(tuple(float(s) for s in schedule), {})
