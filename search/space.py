"""What is searched: K levels out of a model's table, and for each step the blocks to skip."""

from __future__ import annotations

import bisect
import copy
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.layers import LayerMask
from ..core.reuse import ReuseKind, ReuseSpan
from .config import SearchConfig

# A genome: indices into the table, descending, one per level that is not the terminal 0.
Genome = tuple[int, ...]
Masks = tuple[frozenset[str], ...]
# For each step that calls the network: how many steps after it reuse its answer, and how.
Fill = tuple[tuple[int, ReuseKind], ...]
# What a strategy moves: levels of the steps that call the network, their masks, and the steps between them.
Point = tuple[Genome, Masks, Fill]
# Decimals of a coefficient: what lies below them is the machine's rounding, and would make each resumed search a new one.
DIGITS = 4


@dataclass(frozen=True)
class Candidate:
    """Levels with their terminal, and for each step the blocks to skip and the kind of reuse (empty = none anywhere).

    `weights` are the coefficients of the slopes, newest first, for each step that calls the network (empty = Euler's).
    """

    levels: tuple[float, ...]
    masks: Masks = ()
    reuse: tuple[ReuseKind | None, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()
    key: str = field(init=False, compare=False, default="")

    def __post_init__(self) -> None:
        if not any(self.masks):
            object.__setattr__(self, "masks", ())
        if not any(self.reuse):
            object.__setattr__(self, "reuse", ())
        if not any(self.weights):
            object.__setattr__(self, "weights", ())
        text = " ".join(f"{s:.7g}" for s in self.levels)
        if self.masks:
            text += " | " + " ; ".join(",".join(sorted(m)) for m in self.masks)
        if self.reuse:
            text += " | reuse " + " ".join(kind or "-" for kind in self.reuse)
        if self.weights:
            text += " | weights " + " ; ".join(" ".join(f"{w:.{DIGITS}f}" for w in step) for step in self.weights)
        object.__setattr__(self, "key", text)

    @property
    def sigmas(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32)

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def layer_masks(self) -> tuple[LayerMask, ...]:
        """Return the masks keyed by interval of sigma: each binds to its own step, whatever the order they were listed in."""
        spans = zip(self.levels[:-1], self.levels[1:], self.masks)
        return tuple(LayerMask(high, low, tuple(sorted(skip))) for high, low, skip in spans if skip)

    def reuse_spans(self) -> tuple[ReuseSpan, ...]:
        """Return the steps that continue on earlier calls, by interval of sigma."""
        kinds = self.reuse or (None,) * self.steps
        found, knots, call = [], self.knots, -1
        for high, low, kind in zip(self.levels, self.levels[1:], kinds):
            call += kind is None
            weights = self.weights[call] if self.weights else ()
            if kind is None and weights:
                found.append(ReuseSpan(high, knots[call + 1], "fitted", weights))
            elif kind is not None and not weights:
                found.append(ReuseSpan(high, low, kind))
        return tuple(found)

    @property
    def knots(self) -> tuple[float, ...]:
        """The levels at which the network is called, and the terminal."""
        kinds = (*self.reuse, None) if self.reuse else (None,) * len(self.levels)
        return tuple(level for level, kind in zip(self.levels, kinds) if kind is None)


def candidate_of(
    sigmas: Tensor | Sequence[float], masks: Sequence[LayerMask] = (), reuse: Sequence[ReuseSpan] = ()
) -> Candidate:
    """Return the candidate of any descending sigmas, with masks and reuse bound to the steps they hold for."""
    levels = tuple(float(s) for s in sigmas)
    spans = [next((span for span in reuse if span.holds(sigma)), None) for sigma in levels[:-1]]
    kinds: list[ReuseKind | None] = []
    weights: list[tuple[float, ...]] = []
    for before, span in zip([None, *spans], spans):
        inside = span is not None and (span.kind != "fitted" or span is before)
        kinds.append(("last" if span.kind == "fitted" else span.kind) if span is not None and inside else None)
        if not inside:
            weights.append(span.weights if span is not None else ())
    skips = tuple(frozenset(name for mask in masks if mask.holds(sigma) for name in mask.skip) for sigma in levels[:-1])
    return Candidate(levels, skips, tuple(kinds), tuple(weights))


def between(high: float, low: float, count: int) -> list[float]:
    """Return `count` levels between two, evenly in log sigma, down to 0 evenly in sigma."""
    shares = [(i + 1) / (count + 1) for i in range(count)]
    if low == 0:
        return [high * (1 - share) for share in shares]
    return [high * (low / high) ** share for share in shares]


class Space:
    """All schedules of a model under the constraints of a config.

    Args:
        table: the model's levels, ascending (T,).
        config: steps, pinned first level, terminal, gap.
        costs: cost of each block that may be skipped, in network calls.
        fit: coefficients of the steps between these levels, the terminal included; None = Euler's.
    """

    def __init__(
        self, table: Tensor, config: SearchConfig, costs: Mapping[str, float] | None = None,
        fit: Callable[[Sequence[float]], tuple[tuple[float, ...], ...]] | None = None,
    ) -> None:  # fmt: skip
        self.table = [float(s) for s in table]
        self.logs = [math.log(max(s, 1e-12)) for s in self.table]
        self.config = config
        self.costs = dict(costs or {})
        self.fit = fit
        self.most = int(config.max_skip * len(self.costs))
        self.pinned = int(config.pin_first)
        self.tail = (0.0,) if config.terminal_zero else ()
        steps = config.network_steps
        count = steps + (0 if config.terminal_zero else 1)
        self.gap = config.min_gap or max(1, len(self.table) // (20 * steps))
        if (count - 1) * self.gap >= len(self.table):
            raise ValueError(
                f"Expected `steps` that fit the model's {len(self.table)} levels with a gap of {self.gap}, "
                f"but got {steps}. Ask for fewer steps or a smaller `min_gap`."
            )
        self.count = count

    @property
    def top(self) -> int:
        return len(self.table) - 1

    @property
    def budget(self) -> float:
        """Cost a schedule may have, in full network calls."""
        return float(self.config.cost or self.config.network_steps)

    def candidate(self, genome: Genome, masks: Masks = (), fill: Fill = ()) -> Candidate:
        """Return the candidate of a point: its levels from the table, those of reused steps placed between them."""
        knots = tuple(self.table[i] for i in genome) + self.tail
        weights = self.fit(knots) if self.fit else ()
        if not fill:
            return Candidate(knots, masks, (), weights)
        levels: list[float] = []
        kinds: list[ReuseKind | None] = []
        for high, low, (count, kind) in zip(knots, knots[1:], fill):
            levels += [high, *between(high, low, count)]
            kinds += [None, *[kind] * count]
        return Candidate((*levels, knots[-1]), (), tuple(kinds), weights)

    @property
    def reused(self) -> int:
        """How many steps reuse earlier calls."""
        return self.config.steps - self.config.network_steps

    def filled(self, genome: Genome, kind: ReuseKind = "linear") -> Fill:
        """Return the reused steps spread over the widest gaps between the levels of `genome`, in table entries."""
        if not self.reused:
            return ()
        ends = [*genome, -1] if self.tail else list(genome)
        counts = [0] * (len(ends) - 1)
        for _ in range(self.reused):
            widest = max(range(len(counts)), key=lambda i: (ends[i] - ends[i + 1]) / (counts[i] + 1))
            counts[widest] += 1
        return tuple((count, kind) for count in counts)

    def repair(self, indices: Sequence[float], count: int | None = None) -> Genome:
        """Return the nearest legal genome: sorted, inside the table, pinned, no two levels closer than the gap."""
        count = count or self.count
        found = sorted((round(i) for i in indices), reverse=True)[:count]
        found += [0] * (count - len(found))
        if self.pinned:
            found[0] = self.top
        for i in range(count):
            ceiling = self.top if i == 0 else found[i - 1] - self.gap
            found[i] = max(min(found[i], ceiling), self.gap * (count - 1 - i))
        for i in reversed(range(count - 1)):
            found[i] = max(found[i], found[i + 1] + self.gap)
        return tuple(found)

    def index_of(self, sigma: float) -> int:
        """Return the table entry nearest to `sigma` in log scale."""
        log = math.log(max(sigma, 1e-12))
        high = min(max(bisect.bisect_left(self.logs, log), 1), self.top)
        return high if self.logs[high] - log <= log - self.logs[high - 1] else high - 1

    def may_begin(self, sigma: float) -> bool:
        """Return whether a schedule may begin at `sigma`: with the first level pinned at the highest one only."""
        return not self.pinned or self.index_of(sigma) == self.top

    def snap(self, sigmas: Tensor | Sequence[float]) -> Genome:
        """Return the legal genome nearest to any descending sigmas."""
        levels = [float(s) for s in sigmas]
        if self.config.terminal_zero and levels[-1] == 0:
            levels = levels[:-1]
        return self.repair([self.index_of(s) for s in levels])

    def resized(self, genome: Genome, count: int) -> Genome:
        """Return `genome` with `count` levels, evenly over its own pace."""
        places = [*map(float, genome), *([0.0] if self.tail else [])]
        last = count if self.tail else count - 1  # the terminal is a place of its own, at the end
        if count == 1 or len(places) == 1:
            return self.repair(genome[:1], count)
        found = []
        for i in range(count):
            at = i * (len(places) - 1) / last
            low = min(int(at), len(places) - 2)
            found.append(places[low] + (at - low) * (places[low + 1] - places[low]))
        return self.repair(found, count)

    def point_of(self, candidate: Candidate) -> Point:
        """Return the point nearest to a candidate without masks."""
        counts: list[int] = []
        kinds: list[ReuseKind] = []
        for kind in candidate.reuse:
            if kind is None:
                counts.append(0)
                kinds.append("linear")
            else:
                counts[-1] += 1
                kinds[-1] = kind
        if self.fit:
            kinds = ["last"] * len(kinds)
        return self.snap(candidate.knots), (), tuple(zip(counts, kinds))

    def random(self, rng: random.Random, count: int | None = None) -> Genome:
        """Return a genome whose free levels are a uniform random subset of the table."""
        count = count or self.count
        picks = rng.sample(range(self.top if self.pinned else self.top + 1), count - self.pinned)
        return self.repair([*picks, self.top] if self.pinned else picks, count)

    def cost(self, masks: Masks, steps: int) -> float:
        """Return the cost of `steps` steps with `masks` in full network calls."""
        return steps - sum(self.costs[name] for mask in masks for name in mask)

    def most_skipped(self) -> int:
        """Return how many blocks one step may skip at most."""
        return min(self.most, len(self.costs))

    def limited(self, names: Collection[str], share: float = 1.0) -> Space:
        """Return this space with the blocks `names` alone, of which one step may skip at most `share` of all."""
        made = copy.copy(self)
        made.most = min(self.most, int(share * len(self.costs)))
        made.costs = {name: cost for name, cost in self.costs.items() if name in names}
        return made
