"""Where a search for layer masks begins: what each block is worth, measured, and the cheapest way to pay for one more step.

A random mask of a trained network is nearly always ruinous, so masks are not drawn but built. Every look is one probe, a
candidate on the first share of the pairs, and counts like any other evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

from .asks import Ask
from .space import Genome, Masks, Space

Probes = Generator[Ask, list[float], list[tuple[Genome, Masks]]]
SHARES = (0.06, 0.12, 0.2, 0.3, 0.42, 0.55)  # of a step's cost: how deep a step is probed
KEPT = 3  # proposals
REFUSED = 4  # blocks that harm the chain, after which no more are tried


def proposals(space: Space, longer: Sequence[Genome]) -> Probes:
    """Return schedules of one step more than allowed whose masks pay for it, most promising first.

    Every schedule of `longer` is probed, and the best one taken. Each block is probed alone, at all steps; then blocks are
    chained, harmless ones first, leaving out those that are harmful together with the chain; then longer and longer pieces
    of the chain, and runs of neighbouring blocks, are probed at each step alone; and dynamic programming takes the pieces with
    the least sum of damages that save a whole step.
    """
    scores = yield Ask([space.candidate(g) for g in longer], probe=True)
    base, genome = min(zip(scores, longer))
    steps = space.candidate(genome).steps
    alone = yield from _alone(space, genome, steps, base)
    chain = yield from _chained(space, genome, steps, base, alone)
    pieces = list(dict.fromkeys([*_pieces(space, chain), *_runs(space, alone)]))
    asked = [(i, piece) for i in range(steps) for piece in pieces]
    masks = [tuple(piece if j == i else frozenset() for j in range(steps)) for i, piece in asked]
    scores = (yield Ask([space.candidate(genome, m) for m in masks], probe=True)) if masks else []
    damage: list[list[tuple[float, frozenset[str]]]] = [[(0.0, frozenset())] for _ in range(steps)]
    for (i, piece), score in zip(asked, scores):
        damage[i].append((max(score - base, 0.0), piece))
    return [(genome, found) for found in cheapest(space, damage, steps - space.budget)]


def _alone(space: Space, genome: Genome, steps: int, base: float) -> Generator[Ask, list[float], dict[str, float]]:
    """Return how much worse the score gets without each block, for a network call that it saves."""
    names = sorted(space.costs)
    scores = yield Ask([space.candidate(genome, (frozenset({name}),) * steps) for name in names], probe=True)
    return {name: (score - base) / space.costs[name] for name, score in zip(names, scores)}


def _chained(
    space: Space, genome: Genome, steps: int, base: float, alone: dict[str, float]
) -> Generator[Ask, list[float], list[str]]:
    """Return blocks in the order in which they may be left out together; what harms the rest comes last."""
    chain: list[str] = []
    last: list[str] = []
    known = 0.0
    for name in sorted((n for n in alone if math.isfinite(alone[n])), key=lambda n: (alone[n], n)):
        if len(chain) >= space.most_skipped() or len(last) == REFUSED:
            break
        score = (yield Ask([space.candidate(genome, (frozenset([*chain, name]),) * steps)], probe=True))[0]
        expected = known + max(alone[name] * space.costs[name], 0.0)
        if score - base <= 2 * expected + 0.5 * abs(base):
            chain.append(name)
            known = max(score - base, 0.0)
        else:
            last.append(name)
    return chain + last


def _pieces(space: Space, chain: Sequence[str]) -> list[frozenset[str]]:
    """Return the beginnings of the chain that save about `SHARES` of a call."""
    found: list[frozenset[str]] = []
    for share in SHARES:
        saved, count = 0.0, 0
        while count < min(len(chain), space.most_skipped()) and saved < share:
            saved += space.costs[chain[count]]
            count += 1
        piece = frozenset(chain[:count])
        if piece and piece not in found:
            found.append(piece)
    return found


def _runs(space: Space, alone: dict[str, float]) -> list[frozenset[str]]:
    """Return, for each of `SHARES`, the blocks in a row that save so much and do least harm alone.

    In a deep network neighbours do much the same: without a run of them the next block still gets what it knows.
    """
    names = list(space.costs)  # in the order of the network
    harm = {name: max(alone[name], 0.0) * space.costs[name] for name in names}
    found = []
    for share in SHARES:
        runs = []
        for first in range(len(names)):
            last, saved = first, 0.0
            while last < len(names) and saved < share:
                saved += space.costs[names[last]]
                last += 1
            run = names[first:last]
            if saved >= share and 1 < len(run) <= space.most_skipped():
                runs.append((sum(harm[name] for name in run), run))
        if runs and math.isfinite(min(runs)[0]):
            found.append(frozenset(min(runs)[1]))
    return found


def cheapest(space: Space, damage: Sequence[Sequence[tuple[float, frozenset[str]]]], needed: float) -> list[Masks]:
    """Return up to `KEPT` choices of one (damage, piece) a step that save `needed` calls for the least damage in all."""
    # Savings in thousandths of a call, so that there are few different ones; rounded down: a choice never costs too much.
    states: dict[int, tuple[float, Masks]] = {0: (0.0, ())}
    for options in damage:
        grown: dict[int, tuple[float, Masks]] = {}
        for saved, (harm, masks) in states.items():
            for more, piece in options:
                key = saved + int(1000 * sum(space.costs[n] for n in piece) + 1e-6)
                if key not in grown or harm + more < grown[key][0]:
                    grown[key] = (harm + more, (*masks, piece))
        states = grown
    enough = [v for saved, v in states.items() if saved >= 1000 * needed - 1e-6 and math.isfinite(v[0])]
    return [masks for _, masks in sorted(enough, key=lambda v: v[0])[:KEPT]]
