"""Steps and layers searched together against steps alone: equal cost of an image, equal number of evaluations.

    python benchmarks/schedule_layers.py                       # 2, 3, 6 and 8 steps of the bundled model (half an hour)
    python benchmarks/schedule_layers.py --steps 2 --seeds 3

Cost is measured in multiply-adds of the blocks that run, in full network calls. The winners, and the best masked schedule even
when it was not returned, are measured once more on noise that no search has seen: the squared distance to the 20-step result.
What was evaluated is kept in benchmarks/out, and the same command continues from there.
"""

from __future__ import annotations

import argparse

import _common
import torch
from schedule_quality import captions
from slipstream.core import load
from slipstream.search import ModelPath, Schedule, SearchConfig, compare, search
from slipstream.search.space import Candidate


def run(steps: int, seed: int, evaluations: int, repeats: int) -> None:
    pipe = load("pocket")
    path = ModelPath(
        pipe.model,
        pipe.encode_text(captions(32, 11)[1]),
        pipe.encode_text([""]),
        cfg_scale=3.0,
        seed=seed,
        name="pocket",
    )
    _common.OUT.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, layers in (("steps alone", False), ("steps and layers", True)):
        # 20 steps are as good as 50 on this model, and less than half the cost.
        config = SearchConfig(
            steps=steps, evaluations=evaluations, pairs=16, holdout_pairs=32, teacher_steps=20, layers=layers, seed=seed
        )
        result = search(path, config, store=_common.OUT / f"layers_{steps}_{int(layers)}_{seed}.sqlite")
        entries[name] = result.schedule
        masked = next((c for c, _ in result.finalists if c.masks), None)
        if masked is not None and not result.schedule.masks:
            entries["best mask (not returned)"] = as_schedule(masked, result.schedule)
        print(f"{steps} steps, seed {seed}, {name}: {result.evaluations} evaluations, {result.calls} network calls")
    costs = {layer.name: layer.cost for layer in path.layers()}
    names = {f"{name}, cost {cost_of(schedule, costs):.2f}": schedule for name, schedule in entries.items()}
    print(compare(path, names, pairs=16, repeats=repeats, teacher_steps=20).table())
    for mask in entries["steps and layers"].masks:
        print(f"  skips {', '.join(mask.skip)} for sigma {mask.sigma_low:.3g} to {mask.sigma_high:.3g}")
    print(flush=True)


def as_schedule(candidate: Candidate, like: Schedule) -> Schedule:
    return Schedule(candidate.levels, like.model, masks=candidate.layer_masks())


def cost_of(schedule: Schedule, costs: dict[str, float]) -> float:
    """Return full network calls: one a step, less what its mask leaves out."""
    skipped = sum(costs[n] for m in schedule.masks for s in schedule.levels[:-1] if m.holds(s) for n in m.skip)
    return schedule.steps - skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 6, 8])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=6, help="of 16 pairs each, for the interval")
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    for steps in args.steps:
        for seed in range(args.seeds):
            run(steps, seed, args.evaluations, args.repeats)


if __name__ == "__main__":
    main()
