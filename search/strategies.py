"""How candidates are chosen. A strategy is a generator: it yields an `Ask` and receives scores, and is otherwise pure.

Its choices depend on the seed and the scores alone, so that a search which was killed repeats them from the stored scores,
and any number of workers takes the same way.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.reuse import ReuseKind
from .asks import Ask, Strategy
from .space import Fill, Genome, Masks, Point, Space

# The kinds of reuse that need nothing but the calls themselves.
EXTRAPOLATIONS: tuple[ReuseKind, ...] = ("linear", "last")

# ---------------------------------------------------------------------------------------------- coordinate search


def coordinate(space: Space, starts: Sequence[Genome], seed: int, restarts: int = 3, smallest: int = 0) -> Strategy:
    """Pattern search on one level at a time with halving step, from the best starts, then from perturbed winners until the budget ends.

    (Hooke and Jeeves 1961.) The starts are scored first; `smallest` is the last step, 0 = 1/500 of the table. Steps that reuse
    calls are placed between the levels and moved with them.
    """
    rng = random.Random(f"{seed} coordinate")
    smallest = smallest or max(1, len(space.table) // 500)
    points = [(genome, (), fill) for genome in starts for fill in fills(space, genome)]
    scores = yield Ask([space.candidate(*p) for p in points])
    ranked = [point for _, point in sorted(zip(scores, points), key=lambda pair: pair[0])]
    if space.count == space.pinned and (space.fit or not space.reused):
        return
    best: list[tuple[float, Point]] = []
    for point in ranked[:restarts]:
        best.append((yield from descend(space, point, rng, len(space.table) // 8, smallest)))
    while True:
        genome, masks, fill = min(best)[1]
        spread = len(space.table) / 8
        disturbed = space.repair([i + rng.gauss(0, spread) for i in genome])
        best.append((yield from descend(space, (disturbed, masks, fill), rng, len(space.table) // 16, smallest)))


def fills(space: Space, genome: Genome) -> list[Fill]:
    """Return the ways of reuse that a search begins with: every gap extrapolated, every gap on the last slope.

    With fitted coefficients all steps of a gap continue on one slope, wherever they are.
    """
    if not space.reused:
        return [()]
    return [space.filled(genome, kind) for kind in (EXTRAPOLATIONS[1:] if space.fit else EXTRAPOLATIONS)]


def descend(
    space: Space, point: Point, rng: random.Random, step: int, smallest: int
) -> Generator[Ask, list[float], tuple[float, Point]]:
    """Change one coordinate at a time until no change helps, then halve the step; returns (score, point).

    Levels move by +-step. With call reuse the kind of a gap changes, and a reused step moves to another gap. Masks stay with
    their step.
    """
    score = (yield Ask([space.candidate(*point)]))[0]
    while step >= smallest:
        order = [*range(space.pinned, len(point[0])), *(-1 - i for i in range(0 if space.fit else len(point[2])))]
        rng.shuffle(order)
        improved = False
        while order:
            moves = list(_moves(space, point, order, step))
            if not moves:
                break
            scores = yield Ask([space.candidate(*p) for _, p in moves], beat=space.candidate(*point))
            if scores[-1] >= score:
                break
            at, point = moves[len(scores) - 1]
            score, improved = scores[-1], True
            order = order[order.index(at) + 1 :]
        if not improved:
            step //= 2
    return score, point


def _moves(space: Space, point: Point, order: Sequence[int], step: int) -> Iterator[tuple[int, Point]]:
    """Yield (coordinate, changed point): coordinate i is level i, -1 - i the gap after level i."""
    genome, masks, fill = point
    seen = {point}
    for at in order:
        if at < 0:
            changed = [(genome, masks, other) for other in _refilled(fill, -1 - at)]
        else:
            levels = ([v + delta * (i == at) for i, v in enumerate(genome)] for delta in (step, -step))
            changed = [(space.repair(v, len(genome)), masks, fill) for v in levels]
        for moved in changed:
            if moved not in seen:
                seen.add(moved)
                yield at, moved


def _refilled(fill: Fill, at: int) -> Iterator[Fill]:
    """Yield `fill` with the other kind of reuse in gap `at`, and with one of its reused steps in each neighbouring gap."""
    count, kind = fill[at]
    if not count:
        return
    # The first gap has one call before it: both kinds are the same there.
    for other in EXTRAPOLATIONS if at else ():
        if other != kind:
            yield (*fill[:at], (count, other), *fill[at + 1 :])
    for to in (at - 1, at + 1):
        if 0 <= to < len(fill):
            counts = [c - (i == at) + (i == to) for i, (c, _) in enumerate(fill)]
            yield tuple((c, k) for c, (_, k) in zip(counts, fill))


# ----------------------------------------------------------------------------------- AutoDiffusion's evolution


@dataclass(frozen=True)
class Evolution:
    """Shares of AutoDiffusion's evolutionary search (arXiv 2309.10438; numbers of its published scripts)."""

    population: int = 50
    parents: int = 10
    mutations: int = 25
    crossovers: int = 15
    mutation: float = 0.25
    generations: int = 10
    layer_generations: int = 15


def published(space: Space, seed: int, settings: Evolution | None = None) -> Strategy:
    """AutoDiffusion's algorithm on its own: one uniform schedule, random subsets and mutants of the uniform one, evolved.

    Corrections of the published code, by their number in docs/guides/search.md:
    D1 masks do mutate; D2 a mask belongs to its own step; D3 children are never compared by step list, and cost is
    repaired after every operator; D4 duplicate steps are repaired, never dropped; D5 the genome is sorted, so crossover
    exchanges steps of equal rank and no permutation is evaluated twice; D6 the same noise and prompts for all candidates
    and held-out ranking (engine); D7 cost in measured multiply-adds; D8 nothing is parsed by eval, and every evaluation
    is stored (engine); D9 every evaluated generation is ranked; D10 cost counts network calls of the sampler used (engine).
    """
    settings = settings or Evolution()
    space = space.limited(space.costs, 0.2)  # masks are drawn at random here: deep ones are hopeless
    rng = random.Random(f"{seed} published")
    uniform = space.repair([space.top * (space.count - i) / space.count for i in range(space.count)])
    first: dict[Point, None] = {(uniform, (), ()): None}
    while len(first) < settings.population // 2 + 1:
        first[space.random(rng), (), ()] = None
    tries = 0
    while len(first) < settings.population and tries < 10 * settings.population:
        tries += 1
        first[mutate(space, (uniform, (), ()), 0.1, 0.0, rng)] = None
    yield from evolve(space, list(first), rng, settings)


def evolve(space: Space, first: Sequence[Point], rng: random.Random, settings: Evolution, stage: int = 1) -> Strategy:
    """Generations of mutants, crossings and random newcomers from an elite of everything seen (arXiv 2309.10438, alg. 1).

    Stage 1 searches levels only. Stage 2 opens the layers: when the best has not changed for a generation or after the
    fourth, the share that may be skipped grows by a fifth of its maximum each generation.
    """
    seen: dict[Point, float] = {}
    people = list(first)
    generations = settings.layer_generations if space.costs else settings.generations
    share, best = (1.0 if stage == 2 else 0.0), math.inf
    for generation in range(generations + 1):
        people = list(dict.fromkeys(p for p in people if p not in seen))
        if not people:
            return
        scores = yield Ask([space.candidate(*p) for p in people])
        seen |= dict(zip(people, scores))
        ranked = sorted(seen, key=lambda p: seen[p])
        stalled, best = seen[ranked[0]] >= best, min(best, seen[ranked[0]])
        if space.costs and (share > 0 or stalled or generation > 4):
            share = min(1.0, share + 0.2)
        people = offspring(space, ranked[: settings.parents], seen, rng, settings, share)


def offspring(
    space: Space, parents: Sequence[Point], seen: Mapping[Point, float], rng: random.Random,
    settings: Evolution, share: float,
) -> list[Point]:  # fmt: skip
    """Return a generation of individuals not seen before: mutants, crossings, and random ones for the rest."""
    born: dict[Point, None] = {}

    def fill(total: int, make: Iterable[Point]) -> None:
        for child in make:
            if child not in seen:
                born[child] = None
            if len(born) >= total:
                return

    def repeat(count: int, make) -> Iterator[Point]:  # type: ignore[no-untyped-def]
        return (make() for _ in range(10 * count))

    pick = lambda: rng.choice(parents)  # noqa: E731
    fill(
        settings.mutations,
        repeat(settings.mutations, lambda: mutate(space, pick(), settings.mutation, share, rng)),
    )
    fill(
        settings.mutations + settings.crossovers,
        repeat(settings.crossovers, lambda: cross(space, pick(), pick(), rng)),
    )
    fill(
        settings.population,
        repeat(settings.population, lambda: newcomer(space, share, rng)),
    )
    return list(born)


def mutate(space: Space, parent: Point, chance: float, share: float, rng: random.Random) -> Point:
    """Replace each level with probability `chance` by one not in the parent, and change the reuse between them as often; with
    layers open, change the masks too.
    """
    genome, masks, fill = parent
    taken = set(genome)
    levels = list(genome)
    for i in range(space.pinned, len(levels)):
        if rng.random() < chance:
            levels[i] = rng.choice([v for v in range(space.top + 1) if v not in taken] or [levels[i]])
    for at in range(len(fill)):
        if rng.random() < chance:
            fill = rng.choice([*_refilled(fill, at)] or [fill])
    masks = masks or (frozenset(),) * len(levels)
    if share > 0:
        # D1: the published code compares where it should assign, so that a mask once drawn never changes.
        masks, levels = _mutate_masks(space, list(masks), levels, share, rng)
    return repaired(space, levels, masks, fill, share, rng)


def _mutate_masks(
    space: Space, masks: list[frozenset[str]], levels: list[int], share: float, rng: random.Random
) -> tuple[Masks, list[int]]:
    """Toggle a block, swap two blocks, or insert or delete a step."""
    names = sorted(space.costs)
    at = rng.randrange(len(masks))
    draw = rng.random()
    if draw < 0.5:
        masks[at] = masks[at] ^ {rng.choice(names)}
    elif draw < 0.75 and masks[at]:
        free = [n for n in names if n not in masks[at]]
        masks[at] = masks[at] - {rng.choice(sorted(masks[at]))} | ({rng.choice(free)} if free else frozenset())
    elif draw < 0.9:
        levels.append(rng.randrange(space.top))
        masks.append(_random_mask(space, share, rng))
    elif len(levels) > max(space.pinned + 1, space.count - 1):
        at = rng.randrange(space.pinned, len(levels))
        del levels[at], masks[at]
    return tuple(masks), levels


def cross(space: Space, a: Point, b: Point, rng: random.Random) -> Point:
    """Take each step with its mask and its reuse from either parent (D5: parents are sorted, so that equal ranks meet)."""
    first, second = _steps_of(a), _steps_of(b)
    # D3: the longer parent's extra steps come along by a coin each, not by comparing step lists.
    child = [rng.choice(both) for both in zip(first, second)]
    longer = first[len(second) :] or second[len(first) :]
    child += [step for step in longer if rng.random() < 0.5]
    fill = tuple(gap for _, _, gap in child if gap is not None)
    return repaired(space, [v for v, _, _ in child], tuple(m for _, m, _ in child), fill, 1.0, rng)


def _steps_of(point: Point) -> list[tuple[int, frozenset[str], tuple[int, ReuseKind] | None]]:
    """Return (level, mask, the reuse after it) of each step."""
    genome, masks, fill = point
    none: frozenset[str] = frozenset()
    return list(zip(genome, masks or (none,) * len(genome), fill or (None,) * len(genome)))


def newcomer(space: Space, share: float, rng: random.Random) -> Point:
    """Return a random schedule; with layers open, random masks, and as many steps as they pay for."""
    if not space.costs or share == 0:
        genome = space.random(rng)
        return genome, (), rng.choice(fills(space, genome)) if space.reused else ()
    count = space.count + rng.randint(0, 1)
    masks = tuple(_random_mask(space, share, rng) for _ in range(count))
    return repaired(space, space.random(rng, count), masks, (), share, rng)


def _random_mask(space: Space, share: float, rng: random.Random) -> frozenset[str]:
    most = round(space.most_skipped() * share)
    return frozenset(rng.sample(sorted(space.costs), rng.randint(0, most)))


def repaired(
    space: Space, levels: Sequence[int], masks: Sequence[frozenset[str]], fill: Fill, share: float, rng: random.Random
) -> Point:
    """Return a legal individual: sorted with each mask and reuse at its own step, gaps kept (D4), and within the cost (D3, D7)."""
    order = sorted(range(len(levels)), key=lambda i: -levels[i])
    genome = space.repair([levels[i] for i in order], len(levels))
    if fill:
        # Where calls alone are moved, a sum of fitted slopes is one slope for the whole gap, wherever its steps are.
        fill = space.filled(genome, "last") if space.fit else _balanced([fill[i] for i in order], space.reused, rng)
    if not space.costs:
        return genome, (), fill
    kept = [masks[i] for i in order]
    most = space.most_skipped()
    kept = [mask if len(mask) <= most else frozenset(rng.sample(sorted(mask), most)) for mask in kept]
    tail = 0 if space.tail else 1
    while space.cost(tuple(kept), len(genome) - tail) > space.budget + 1e-9:
        open_steps = [i for i, mask in enumerate(kept) if len(mask) < most]
        if open_steps and rng.random() < 0.8:
            at = rng.choice(open_steps)
            kept[at] = kept[at] | {rng.choice(sorted(set(space.costs) - kept[at]))}
        elif len(genome) > space.pinned + 1:
            at = rng.randrange(space.pinned, len(genome))
            genome, kept = genome[:at] + genome[at + 1 :], kept[:at] + kept[at + 1 :]
        else:
            break
    return genome, tuple(kept) if any(kept) else (), fill


def _balanced(gaps: Sequence[tuple[int, ReuseKind]], total: int, rng: random.Random) -> Fill:
    """Return `gaps` with steps added to or taken from random ones until they reuse `total`."""
    counts = [count for count, _ in gaps]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        at = rng.choice([i for i, count in enumerate(counts) if count + step >= 0])
        counts[at] += step
    return tuple((count, kind) for count, (_, kind) in zip(counts, gaps))


# ----------------------------------------------------------------------------------------------------- together


def auto(space: Space, starts: Sequence[Genome], seed: int, restarts: int, longer: Sequence[Genome] = ()) -> Strategy:
    """Coordinate search until its restarts have converged, then evolution of what it found.

    With layers open, coordinate search is short and coarse; masks are built that pay for one of the schedules `longer`, which
    have a step more; and the levels of the best masked one are searched before evolution takes all.
    """
    from .masking import proposals

    rng = random.Random(f"{seed} auto")
    found: dict[Point, float] = {}
    restarts, smallest = (1, max(1, len(space.table) // 64)) if space.costs else (restarts, 0)
    yield from _converged(space, coordinate(space, starts, seed, restarts, smallest), restarts, found)
    first = sorted(found, key=lambda p: found[p])[:20]
    if longer:
        built = yield from proposals(
            space, list(dict.fromkeys([*longer, space.resized(first[0][0], len(first[0][0]) + 1)]))
        )
        scores = (yield Ask([space.candidate(*p) for p in built])) if built else []
        first += [(genome, masks, ()) for genome, masks in built]
        if built and math.isfinite(min(scores)):
            genome, masks = built[scores.index(min(scores))]
            _, point = yield from descend(space, (genome, masks, ()), rng, len(space.table) // 8, smallest)
            first.append(point)
            space = space.limited({name for _, m in built for mask in m for name in mask})
    settings = Evolution(generations=10**6, layer_generations=10**6)
    yield from evolve(space, first, rng, settings, stage=2 if space.costs else 1)


def _converged(space: Space, steps_only: Strategy, restarts: int, found: dict[Point, float]) -> Strategy:
    """Run coordinate search until its `restarts` have ended; keeps the scores in `found`."""
    scores: list[float] | None = None
    descents = 0
    while True:
        try:
            ask = next(steps_only) if scores is None else steps_only.send(scores)
        except StopIteration:
            return
        descents += ask.beat is None
        # The first ask is the starts, each further one without `beat` begins a descent.
        if descents > restarts + 1:
            return
        scores = yield ask
        found |= {space.point_of(c): s for c, s in zip(ask.candidates, scores)}
