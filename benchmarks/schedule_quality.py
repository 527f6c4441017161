"""How much a searched schedule gains, at equal cost, over every stock schedule.

    python benchmarks/schedule_quality.py                      # everything
    python benchmarks/schedule_quality.py toys pocket          # parts: toys, pocket, layers, overhead
    python benchmarks/schedule_quality.py pocket --seeds 5

toys     two models whose score is known exactly: a 2-D mixture and 64-D digits (scikit-learn), 4 DDIM steps, first level
         pinned; FID in raw space against exact samples; the published algorithm beside ours in one run
pocket   the bundled model at 2, 3 and 4 steps. Each seed searches again, the level to start from included, and is then
         measured on captions and noise that its search has not seen: Frechet distance to 50-step samples and to real
         scenes, and the share of images whose every attribute is as the caption says. Features: the attribute
         checker's, standardised on real scenes; the search minimises the same distance to 20-step samples. What is done
         is kept in benchmarks/out: seeds may run side by side (`--first-seed 3 --seeds 1`), and a last run with all seeds
         prints the table
layers   steps and blocks together against steps alone, at equal cost in multiply-adds and 150 evaluations each
overhead share of a search's time that is not spent in the network
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import _common
import _mixtures
import torch
from slipstream.core import Conditioning, load
from slipstream.core.schedules import with_zero
from slipstream.search import ModelPath, ReferenceImages, SearchConfig, SearchResult, SelfDistribution, search
from slipstream.search.comparison import Interval, interval
from slipstream.search.evaluation import teacher_sigmas
from slipstream.search.features import NetworkFeatures
from slipstream.search.statistics import frechet_distance, moments
from torch import Tensor

SEARCHED = "* searched"
PAIRS = 96  # of a search on the pocket model, and as many held out
Cell = tuple[float, float, float]
NAMES = {"uniform": "linspace (host: normal)", "leading": "ddim_uniform"}


class Raw:
    """The latents themselves as features."""

    id = "raw"

    def of_latents(self, latents: Tensor) -> Tensor:
        return latents.flatten(1)

    def of_images(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(images))


# ---------------------------------------------------------------------------------------------------------- toys


def toy_path(model: Any, seed: int) -> ModelPath:
    return ModelPath(model, Conditioning(torch.zeros(1, 1, 1)), size=model.size, seed=seed, batch=1000)


def reached(result: SearchResult, optimum: float) -> int | None:
    """Return after how many evaluations the best score was within 2 % of the optimum."""
    return next((n for n, score in result.history if score <= 1.02 * optimum), None)


def models() -> dict[str, tuple[Any, list[int]]]:
    """Return the toy models, each with the best timesteps that a first study of them found."""
    found = {"2-D mixture": (_mixtures.ring(), [999, 444, 214, 48])}
    try:
        found["64-D digits"] = (_mixtures.digits(), [999, 610, 364, 88])
    except ImportError:
        print("scikit-learn is not installed: the digits are left out")
    return found


def toys(seeds: int, budget: int = 150) -> None:
    for name, (model, known) in models().items():
        exact = moments(model.draw(50_000, 4321))
        objective = ReferenceImages(list(model.draw(20_000, 12345).float()), Raw())
        fresh = toy_path(model, 999)

        def final(sigmas: Tensor, fresh: ModelPath = fresh, exact: Any = exact) -> float:
            return frechet_distance(*moments(fresh.sample(sigmas, range(10_000)).flatten(1)), *exact)

        stock = {n: final(s) for n, s in fresh.stock(4).items()}
        study = final(with_zero(model.levels.t_to_sigma(torch.tensor(known))))
        print(
            f"\n{name}, 4 DDIM steps: FID on 10000 fresh samples, 200 steps give {final(fresh.stock(200)['uniform']):.4f}"
        )
        for n, value in sorted(stock.items(), key=lambda pair: -pair[1]):
            print(f"  {NAMES.get(n, n):<26} {value:.4f}")
        print(f"  {'best of the study ' + str(known):<26} {study:.4f}")
        print("  seed  strategy    FID     linspace/FID  best stock/FID  evaluations to 2 % of the optimum  timesteps")
        for seed in range(seeds):
            found = {}
            for strategy, evaluations in (("auto", budget), ("published", 550)):
                config = SearchConfig(
                    steps=4, strategy=strategy, evaluations=evaluations, pairs=1000, holdout_pairs=1000,
                    teacher_steps=60, halving=False, seed=seed,
                )  # fmt: skip
                found[strategy] = search(toy_path(model, 1000 + seed), config, objective)
            optimum = min(r.history[-1][1] for r in found.values())
            for strategy, result in found.items():
                levels = torch.tensor(result.finalists[0][0].levels)
                value, count = final(levels), reached(result, optimum)
                steps = [round(float(t)) for t in model.levels.sigma_to_t(levels[:-1])]
                print(
                    f"  {seed:<5} {strategy:<11} {value:.4f}  {stock['uniform'] / value:<13.2f} "
                    f"{min(stock.values()) / value:<15.2f} {count or f'not in {result.evaluations}':<34} {steps}"
                )


# -------------------------------------------------------------------------------------------------------- pocket


def captions(count: int, seed: int) -> tuple[list[Any], list[str]]:
    """Return random scenes and their full captions."""
    import numpy as np
    from slipstream_tools.pocket.scenes import caption, sample_scene

    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, [caption(scene) for scene in scenes]


def pocket_path(pipe: Any, texts: list[str], seed: int, cfg_scale: float = 3.0) -> ModelPath:
    return ModelPath(
        pipe.model, pipe.encode_text(texts), pipe.encode_text([""]), (4, 16, 16), "euler", cfg_scale, seed, 16, "pocket"
    )


class Judge:
    """Checker features of images, standardised on real scenes, and the share of right captions."""

    def __init__(self) -> None:
        from slipstream_tools.pocket.checker import load_checker
        from slipstream_tools.pocket.scenes import render

        self.checker = load_checker()
        real = self.raw(render(captions(2000, 77)[0], 128))
        # Units that never fire on real scenes have no scale to be standardised with.
        self.alive = real.std(0) > 1e-4 * real.std(0).max()
        real = real[:, self.alive]
        self.mean, self.deviation = real.mean(0), real.std(0)
        self.real = moments((real - self.mean) / self.deviation)

    def raw(self, images: Tensor) -> Tensor:
        from slipstream_tools.pocket.checker import features

        return features(self.checker, images)

    def images_of(self, pipe: Any, latents: Tensor) -> Tensor:
        return torch.cat([pipe.decode(part) for part in latents.split(16)]).movedim(-1, 1) * 2 - 1

    def vectors(self, images: Tensor) -> Tensor:
        return (self.raw(images)[:, self.alive] - self.mean) / self.deviation

    def right(self, images: Tensor, scenes: Sequence[Any]) -> float:
        from slipstream_tools.pocket.checker import score

        return score(self.checker, images, scenes)["all"]


def pocket(images: int, seeds: Sequence[int], evaluations: int, steps: Sequence[int]) -> None:
    pipe, judge = load("pocket"), Judge()
    stock = {count: pocket_path(pipe, [""], 0).stock(count) for count in steps}
    found: dict[int, dict[str, list[Cell]]] = {count: {} for count in steps}
    many = []
    for seed in seeds:
        test = Test(pipe, judge, images, seed)
        many.append(test("50 steps", teacher_sigmas(test.path.table(), 50)))
        for count in steps:
            schedules = {**stock[count], SEARCHED: searched(pipe, judge, count, evaluations * count, seed)}
            for name, sigmas in schedules.items():
                found[count].setdefault(name, []).append(test(f"{count} {name}", sigmas))
    print(f"\n{images} images x {len(many)} seeds, captions and noise not searched on, cfg 3, euler (DDIM)")
    for i, what in ((1, "FD to real scenes"), (2, "all attributes right")):
        print(f"50 steps: {what} {interval([cell[i] for cell in many])}")
    for count in steps:
        report_pocket(count, found[count])


def searched(pipe: Any, judge: Judge, steps: int, evaluations: int, seed: int) -> Tensor:
    """Return what a search finds that has a free first level; 20 steps are as good as 50 here, at less than half the cost."""
    path = pocket_path(pipe, captions(2 * PAIRS, 110 + seed)[1], 10 + seed)
    config = SearchConfig(
        steps=steps,
        pin_first=False,
        evaluations=evaluations,
        pairs=PAIRS,
        holdout_pairs=PAIRS,
        teacher_steps=20,
        seed=seed,
    )
    features = NetworkFeatures(pipe.decode, lambda image: judge.vectors(image.movedim(-1, 1) * 2 - 1), "checker")
    _common.OUT.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    result = search(path, config, SelfDistribution(features), store=_common.OUT / f"pocket_{steps}_{seed}.sqlite")
    result.schedule.save(_common.OUT / f"pocket_{steps}_{seed}.json")
    timesteps = [round(t) for t in result.schedule.timesteps or ()]
    spent = f"{result.evaluations} evaluations, {result.calls} network calls, {time.perf_counter() - begin:.0f} s"
    print(f"{steps} steps, seed {seed}: timesteps {timesteps} after {spent}", flush=True)
    return result.schedule.sigmas


class Test:
    """Measures schedules on one seed's captions and noise; what was measured is kept in benchmarks/out by content."""

    def __init__(self, pipe: Any, judge: Judge, images: int, seed: int) -> None:
        self.pipe, self.judge, self.images = pipe, judge, images
        self.scenes, texts = captions(images, 5000 + seed)
        self.path = pocket_path(pipe, texts, 900 + seed)
        content = json.dumps([self.path.identity(), images, seed], sort_keys=True)
        self.folder = _common.OUT / f"pocket_{seed}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, sigmas: Tensor) -> Cell:
        """Return (FD to 50 steps, FD to real scenes, share of images with all attributes right)."""
        kept = self.folder / f"{hashlib.sha256(json.dumps(sigmas.tolist()).encode()).hexdigest()[:12]}.pt"
        if not kept.is_file():
            images = self.judge.images_of(self.pipe, self.path.sample(sigmas, range(self.images)))
            torch.save((self.judge.vectors(images), self.judge.right(images, self.scenes)), kept)
        vectors, right = torch.load(kept)
        if name == "50 steps":
            self.many = moments(vectors)
        own = moments(vectors)
        return frechet_distance(*own, *self.many), frechet_distance(*own, *self.judge.real), right


def report_pocket(count: int, rows: dict[str, list[Cell]]) -> None:
    print(f"\n{count} steps{'':<20} FD to 50 steps      FD to real scenes   all attributes right")
    for name, values in sorted(rows.items(), key=lambda pair: sum(v[0] for v in pair[1])):
        cells = [interval([v[i] for v in values]) for i in range(3)]
        print(f"  {NAMES.get(name, name):<26}" + "".join(f"{cell!s:<20}" for cell in cells))
    for i, what in enumerate(("FD to 50 steps", "FD to real scenes")):
        best = min((n for n in rows if n != SEARCHED), key=lambda n: sum(v[i] for v in rows[n]))
        ratio: Interval = interval([b[i] / s[i] for b, s in zip(rows[best], rows[SEARCHED])])
        print(f"  factor over the best stock schedule ({NAMES.get(best, best)}) in {what}: {ratio}")


# ------------------------------------------------------------------------------------------------ layers, overhead


def layers(steps: Sequence[int]) -> None:
    """See schedule_layers.py, which has more options."""
    import schedule_layers

    for count in steps:
        schedule_layers.run(count, 0, evaluations=150, repeats=6)


class Timed(ModelPath):
    """Counts the seconds inside the sampler."""

    spent = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        begin = time.perf_counter()
        found = super().sample(*args, **kwargs)
        self.spent += time.perf_counter() - begin
        return found


def overhead(evaluations: int) -> None:
    pipe = load("pocket")
    texts = pipe.encode_text(captions(32, 11)[1])
    path = Timed(pipe.model, texts, pipe.encode_text([""]), (4, 16, 16), "euler", 3.0, 1, 16, "pocket")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        config = SearchConfig(steps=3, evaluations=evaluations, pairs=16, holdout_pairs=16, teacher_steps=20)
        search(path, config, store=f"{folder}/a.sqlite")
        total = time.perf_counter() - begin
    print(f"\noverhead: {total - path.spent:.2f} s of {total:.1f} s are not sampling: {1 - path.spent / total:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["toys", "pocket", "layers", "overhead"])
    parser.add_argument("--images", type=int, default=128, help="images per seed for the pocket model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 4], help="step counts for the pocket model")
    parser.add_argument("--evaluations", type=int, default=15, help="per step searched on the pocket model")
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    if "toys" in args.parts:
        toys(args.seeds)
    if "pocket" in args.parts:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        pocket(args.images, seeds, args.evaluations, args.steps)
    if "layers" in args.parts:
        layers(args.steps)
    if "overhead" in args.parts:
        overhead(25)


if __name__ == "__main__":
    _common  # noqa: B018 - makes the packages importable
    main()
