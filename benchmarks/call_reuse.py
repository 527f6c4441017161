"""Which network calls of 20 steps to leave out: the search against caches, plain steps and BudCache's annealing, at equal calls.

    python benchmarks/call_reuse.py                                  # every model, 6 and 10 of 20 calls, three seeds
    python benchmarks/call_reuse.py ring digits --calls 3 4          # what the coefficients bring at very few calls
    python benchmarks/call_reuse.py overhead                         # operators and time of reuse beside those of a step
    HOST/.venv/bin/python benchmarks/call_reuse.py pocket --comfyui HOST     # also EasyCache and LazyCache, the host's own nodes

"ring-flow" and "digits-flow" are the mixtures as flow models with shift 3. With --save FILE what is there already is not measured again.

Error: root mean square distance to the 20-step result from the same noise, over the result's own root mean square; 95 %
intervals over seeds and repeats, on noise that nothing was searched on; each seed searches again. "typical" is the median over single
samples: one that falls into another mode outweighs all others in a mean square. Caches have no budget: their threshold is bisected
until they make as many calls, and what they then made is printed. "captions" is the share of decoded images with every attribute of
their caption. BudCache's annealing has 220 evaluations; the line below the table tells after how many the search had reached its error.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import _common  # noqa: F401 - makes the package importable
import torch
from _mixtures import Mixture, digits, ring
from schedule_quality import captions
from slipstream.core import CFG, Conditioning, load
from slipstream.core.guidance import Denoise
from slipstream.core.reuse import CallReuse, ReuseSpan
from slipstream.core.schedules import make_sigmas
from slipstream.search import ModelPath, SearchConfig, paths, search
from slipstream.search.coefficients import Course, followed_weights
from slipstream.search.comparison import interval
from slipstream.search.paths import SamplingPath, Trajectory
from slipstream.search.space import Candidate
from slipstream_tools.pocket import checker as reading
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 20
MODELS = ("pocket", "pocket-flow", "ring", "ring-flow", "digits", "digits-flow")
HELD_OUT = 1_000_000  # first pair of the measurement


class ResidualReuse(CallReuse):
    """Keeps the residual denoised - x of the last call, as residual caches do (same bookkeeping as ours)."""

    def _slope(self, sigma: float, span: ReuseSpan) -> Tensor:
        last_sigma, last = self._slopes[-1]
        return last * (last_sigma / sigma)


class ThresholdReuse(ResidualReuse):
    """Calls the network when its input has changed by `threshold` since the last call, relative and added up over the steps.

    TeaCache's rule (arXiv 2411.19108) without its polynomial, which is fitted to one network's embedding.
    """

    threshold = 0.1
    changed = 0.0
    before: Tensor | None = None

    def __call__(self, denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(torch.as_tensor(sigma).flatten()[0])
        seen = x / (1 + level**2) ** 0.5
        if self.before is not None:
            self.changed += float((seen - self.before).abs().mean() / self.before.abs().mean())
        self.before = seen
        if self._slopes and self.changed < self.threshold:
            self.reused += 1
            return x - level * self._slope(level, WHOLE)
        self.changed = 0.0
        return self._compute(denoise, x, torch.as_tensor(sigma), level)


WHOLE = ReuseSpan(1e6, 0.0, "last")


@dataclass
class Job:
    """One model as a user samples it, with its full run."""

    name: str
    path: ModelPath
    sigmas: Tensor
    measured: int  # samples a repeat
    right: Callable[[Tensor, Sequence[int]], float] | None = None  # share of latents of pairs that are as captioned


def relative(found: Tensor, full: Tensor) -> float:
    return float((found - full).pow(2).mean().sqrt() / full.pow(2).mean().sqrt())


def make_job(name: str, seed: int, schedule: str = "") -> Job:
    """Return a model with its full run: karras for eps models and simple for flow models, unless `schedule` names another."""
    schedule = schedule or ("simple" if name.endswith("-flow") else "karras")
    if name.startswith("pocket"):
        pipe = load(name)
        scenes, texts = captions(32, 11) if name == "pocket" else ([], flow_captions(32, 11))
        path = ModelPath(
            pipe.model, pipe.encode_text(texts), pipe.encode_text([""]), (pipe.latent_channels, 16, 16), cfg_scale=3.0,
            seed=seed, name=name,
        )  # fmt: skip

        def right(latents: Tensor, pairs: Sequence[int]) -> float:
            images = torch.cat([pipe.decode(part) for part in latents.split(16)])
            checker = reading.load_checker()
            return reading.score(checker, images.movedim(-1, 1) * 2 - 1, [scenes[p % 32] for p in pairs])["all"]

        return Job(name, path, make_sigmas(schedule, path.model.levels, STEPS), 16, right if scenes else None)
    model: Mixture = (ring if name.startswith("ring") else digits)(flow=name.endswith("-flow"))
    path = ModelPath(model, Conditioning(torch.zeros(1, 1, 1)), size=model.size, seed=seed, batch=256, name=name)
    return Job(name, path, make_sigmas(schedule, path.model.levels, STEPS), 256)


def flow_captions(count: int, seed: int) -> list[str]:
    """Return captions of pocket-flow's scenes."""
    import numpy as np
    from slipstream_tools.pocket import flow_scenes as flow

    scenes = flow.sample_scenes(count, np.random.default_rng(seed))
    return [flow.caption(scenes, i) for i in range(count)]


def cached(path: ModelPath, sigmas: Tensor, pairs: Sequence[int], make: Callable[[], CallReuse]) -> Tensor:
    """Sample with a cache of another kind in the place of ours; `make` gives one for each batch."""

    def reusing(denoise: Denoise, spans: Sequence[ReuseSpan]) -> Denoise:
        reuse = make()
        return lambda x, sigma: reuse(denoise, x, torch.as_tensor(sigma))

    plain, paths.reusing = paths.reusing, reusing
    try:
        return path.sample(sigmas, pairs, reuse=(WHOLE,))
    finally:
        paths.reusing = plain


def residual(path: ModelPath, sigmas: Tensor, pairs: Sequence[int], computed: Sequence[int]) -> Tensor:
    """Sample with the residual of the last call kept in every step that is not in `computed`."""
    spans = [span(sigmas, i) for i in range(len(sigmas) - 1) if i not in computed]
    return cached(path, sigmas, pairs, lambda: ResidualReuse(spans))


def thresholded(path: ModelPath, sigmas: Tensor, pairs: Sequence[int], threshold: float) -> tuple[float, Tensor]:
    """Sample with a threshold; returns (calls a sample, latents)."""
    made: list[ThresholdReuse] = []

    def make() -> ThresholdReuse:
        made.append(ThresholdReuse(()))
        made[-1].threshold = threshold
        return made[-1]

    found = cached(path, sigmas, pairs, make)
    return sum(m.computed for m in made) / len(made), found


def bisected(calls: int, run: Callable[[float], tuple[float, Tensor]], tries: int = 12) -> tuple[float, float]:
    """Return (calls, threshold) of the threshold that comes nearest to `calls`."""
    low, high, tried = 0.0, 3.0, []
    for _ in range(tries):
        threshold = (low + high) / 2
        made, _ = run(threshold)
        tried.append((abs(made - calls), made, threshold))
        low, high = (threshold, high) if made > calls else (low, threshold)
    return min(tried)[1:]


def span(sigmas: Tensor, i: int) -> ReuseSpan:
    return ReuseSpan(float(sigmas[i]), float(sigmas[i + 1]), "last")


def uniform_skip(calls: int) -> list[int]:
    return sorted({round(i * STEPS / calls) for i in range(calls)})


def annealed(job: Job, calls: int, pairs: Sequence[int], seed: int) -> list[int]:
    """BudCache's search (arXiv 2606.13496): 200 trials of annealing and 20 of hill climbing over which steps compute."""
    rng = random.Random(seed)
    full = job.path.sample(job.sigmas, pairs)
    score = lambda c: float((residual(job.path, job.sigmas, pairs, c) - full).pow(2).mean())  # noqa: E731

    def neighbour(now: list[int]) -> list[int]:
        out, into = rng.choice(now[1:]), rng.choice([i for i in range(1, STEPS) if i not in now])
        return sorted({*now, into} - {out})

    now = best = uniform_skip(calls)
    value = least = score(now)
    for trial in range(220):
        other = neighbour(best if trial >= 200 else now)
        found = score(other)
        heat = max(1e-9, (1 - trial / 200) * least)
        if found < value or (trial < 200 and rng.random() < torch.exp(torch.tensor((value - found) / heat))):
            now, value = other, found
        if found < least:
            best, least = other, found
    return best


@dataclass
class Row:
    """What one method came to: errors by repeat, the median errors by repeat, shares of right captions."""

    calls: float
    evaluations: int = 0
    errors: list[float] = field(default_factory=list)
    typical: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def add(self, found: Tensor, full: Tensor, right: float | None = None) -> None:
        self.errors.append(relative(found, full))
        self.typical.append(statistics.median(relative(f, t) for f, t in zip(found, full)))
        self.right += [] if right is None else [right]

    def join(self, other: Row) -> None:
        for name in ("errors", "typical", "right"):
            getattr(self, name).extend(getattr(other, name))


Rows = dict[str, Row]
Methods = dict[str, tuple[Row, Callable[[Sequence[int]], Tensor]]]


def measure(job: Job, calls: int, args: argparse.Namespace, seed: int) -> Rows:
    """Search, anneal and bisect at a budget of calls, and measure every method on fresh noise."""
    methods, history = searched(job, calls, args, seed)
    full, begin = job.sigmas, range(args.pairs)
    made, threshold = bisected(calls, lambda t: thresholded(job.path, full, begin, t))
    methods["input threshold, residual"] = (Row(made), lambda p: thresholded(job.path, full, p, threshold)[1])
    skip = uniform_skip(calls)
    methods["uniform skip, residual"] = (Row(calls), lambda p: residual(job.path, full, p, skip))
    rows: Rows = {}
    if not args.no_anneal:
        budcache, reached = rival(job, calls, history, begin, seed)
        methods |= budcache
        rows["search reached BudCache's error"] = Row(calls, reached, [float(reached)])
    methods["full run"] = (Row(STEPS), lambda p: job.path.sample(full, p))
    for i in range(args.repeats):
        pairs = list(range(HELD_OUT + i * job.measured, HELD_OUT + (i + 1) * job.measured))
        truth = job.path.sample(full, pairs)
        for row, sample in methods.values():
            found = sample(pairs)
            row.add(found, truth, job.right(found, pairs) if job.right else None)
    return {name: row for name, (row, _) in methods.items()} | rows


def searched(job: Job, calls: int, args: argparse.Namespace, seed: int) -> tuple[Methods, list[tuple[int, float]]]:
    """Return ours and the best stock schedule, and the search's best score by evaluation."""
    methods: Methods = {}
    history: list[tuple[int, float]] = []
    for name, fit in (("searched, calls left out only", False), ("searched, fitted", None)):
        config = SearchConfig(
            steps=STEPS, computed=calls, full=tuple(job.sigmas.tolist()), evaluations=args.evaluations, pairs=args.pairs,
            holdout_pairs=2 * args.pairs, seed=seed, fit=fit,
        )  # fmt: skip
        result = search(job.path, config)
        found, history = result.schedule, list(result.history)
        methods[name] = Row(found.nfe, result.evaluations), scheduled(job, found.sigmas, found.reuse)
    best = min(result.baselines, key=lambda name: result.baselines[name])
    stock = job.path.stock(calls)[best]
    methods["plain steps, best stock schedule"] = Row(calls), scheduled(job, stock)
    spans = fitted(job, stock, range(min(8, args.pairs)))
    methods["its levels, fitted"] = Row(calls, 1), scheduled(job, stock, spans)
    return methods, history


def rival(
    job: Job, calls: int, history: Sequence[tuple[int, float]], pairs: Sequence[int], seed: int
) -> tuple[Methods, int]:
    """Return BudCache's annealing as published and with our coefficients on its calls, and after how many evaluations the search
    had reached the published one's error on the search's pairs (a million: never).
    """
    chosen = annealed(job, calls, pairs[:4], seed)
    knots = torch.cat([job.sigmas[chosen], job.sigmas[-1:]])
    spans = fitted(job, knots, pairs[:8])
    methods: Methods = {
        "BudCache's annealing, residual": (Row(calls, 220), lambda p: residual(job.path, job.sigmas, p, chosen)),
        "its calls, our coefficients": (Row(calls, 220), scheduled(job, knots, spans)),
    }
    full = job.path.sample(job.sigmas, pairs)
    error = float((residual(job.path, job.sigmas, pairs, chosen) - full).pow(2).mean())
    return methods, next((n for n, score in history if score <= error), 1_000_000)


def print_table(title: str, rows: Rows) -> None:
    print(f"\n{title}")
    print(f"{'method':36} {'calls':>6} {'evaluations':>12}  {'error':18} {'typical':>8} {'captions':>9}")
    for name, row in rows.items():
        if not row.typical:
            tried = ", ".join("never" if n > 1e5 else f"{n:.0f}" for n in row.errors)
            print(f"{name} after {tried} evaluations (one number a seed)")
            continue
        seen = f"{100 * statistics.mean(row.right):.0f} %" if row.right else ""
        print(
            f"{name:36} {row.calls:6.3g} {row.evaluations or '':>12}  {interval(row.errors)!s:18} "
            f"{statistics.mean(row.typical):8.3g} {seen:>9}",
            flush=True,
        )


def scheduled(job: Job, sigmas: Tensor, reuse: Sequence[ReuseSpan] = ()) -> Callable[[Sequence[int]], Tensor]:
    return lambda pairs: job.path.sample(sigmas, pairs, reuse=reuse)


def fitted(job: Job, sigmas: Tensor, pairs: Sequence[int]) -> tuple[ReuseSpan, ...]:
    """Return coefficients for the levels of a stock schedule: S4S as a second stage alone."""
    watch = Trajectory([], [], [])
    course = Course.of(watch, job.path.sample(job.sigmas, pairs, watch=watch))
    levels = sigmas.tolist()
    return Candidate(tuple(levels), weights=followed_weights(job.path, course, levels, 3, pairs)).reuse_spans()


# --------------------------------------------------------------------------------------------------- overhead


class Operators(TorchDispatchMode):
    """Counts the operators that run within the context."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def timed(run: Callable[[], Any], repeats: int = 50) -> tuple[int, float]:
    """Return (operators, milliseconds of processor time) of one run."""
    with torch.no_grad():
        with Operators() as operators:
            run()
        began = time.process_time()
        for _ in range(repeats):
            run()
    return operators.count, (time.process_time() - began) / repeats * 1000


def overhead(name: str) -> None:
    """Print what reuse adds to a computed step, and what a reused step costs in all, beside a step of the network."""
    pipe = load(name)
    guided = CFG(pipe.model, pipe.encode_text(["a red circle"]), pipe.encode_text([""]), 3.0)
    x = torch.randn(1, pipe.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    levels = [torch.tensor(s) for s in make_sigmas("simple", pipe.model.levels, STEPS).tolist()]
    spans = [ReuseSpan(float(levels[3]), float(levels[10]), "fitted", (1.2, -0.3, 0.1))]

    def reusing(steps: int) -> None:
        reuse = CallReuse(spans)
        for level in levels[:steps]:
            reuse(lambda x, sigma: x, x, level)

    (_, before), (few, computed), (more, reused) = (timed(functools.partial(reusing, n), 500) for n in (3, 4, 5))
    operators, step = timed(lambda: guided(x, levels[3]))
    print(f"\n{name:24} {'operators':>10} {'milliseconds':>13} {'of a step':>10}")
    at_three = timed(functools.partial(reusing, 3), 1)[0]
    for label, count, spent in (
        ("a step", operators, step),
        ("computed, on top", few - at_three, computed - before),
        ("reused, in all", more - few, reused - computed),
    ):
        print(f"{label:24} {count:10} {spent:13.3f} {100 * spent / step:8.2f} %", flush=True)


# ------------------------------------------------------------------------------------------------- in the host


def in_host(folder: pathlib.Path) -> dict[str, Any]:
    """Import the host and return its caching nodes, by name."""
    sys.path.insert(0, str(folder))
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    from comfy_extras import nodes_easycache

    sys.argv = arguments
    return {"EasyCache": nodes_easycache.EasyCacheNode, "LazyCache": nodes_easycache.LazyCacheNode}


WINDOWS = ((0.15, 0.95), (0.0, 1.0))  # shares of the run in which a cache may act: the nodes' default, and all of it


def with_cache(node: Any, threshold: float, window: tuple[float, float], model: Any) -> Any:
    return node.execute(model, threshold, *window, False).args[0]


def host_path(name: str, cached: Callable[[Any], Any], seed: int, text: str, counts: list[int]) -> SamplingPath:
    import comfy.samplers
    from slipstream.nodes.host.search_path import HostPath
    from slipstream.nodes.models import LoadModel

    model, clip, *_ = LoadModel().load(name)
    encode = lambda t: clip.encode_from_tokens_scheduled(clip.tokenize(t))  # noqa: E731
    model = cached(model)
    counts.clear()
    forward = model.model.diffusion_model._forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return forward(*args, **kwargs)

    model.add_object_patch("diffusion_model._forward", counted)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(encode(text), encode(""))
    guider.set_cfg(3.0)
    latent = {"samples": torch.zeros(1, model.model.latent_format.latent_channels, 16, 16)}
    return HostPath(guider, comfy.samplers.sampler_object("euler"), latent, seed)


def measure_caches(job: Job, folder: pathlib.Path, calls: int, batch: int, seed: int) -> Rows:
    """Bisect each cache's threshold to `calls` calls on one prompt, and measure its error there.

    Tried are its default window and the whole run; what comes nearer to the calls counts, then what has less error.
    """
    nodes, counts, rows = in_host(folder), [], {}
    pairs = list(range(HELD_OUT, HELD_OUT + batch))
    text = captions(1, 11 + seed)[1][0] if job.name == "pocket" else flow_captions(1, 11 + seed)[0]
    full = host_path(job.name, lambda model: model, seed, text, counts).sample(job.sigmas, pairs)
    for name, node in nodes.items():

        def run(threshold: float, window: tuple[float, float], node: Any = node) -> tuple[float, Tensor]:
            cache = functools.partial(with_cache, node, threshold, window)
            found = host_path(job.name, cache, seed, text, counts).sample(job.sigmas, pairs)
            return len(counts), found

        tried = []
        for window in WINDOWS:
            made, threshold = bisected(calls, functools.partial(run, window=window), 8)
            tried.append(row := Row(made))
            row.add(run(threshold, window)[1], full)
        rows[f"{name} (host)"] = min(tried, key=lambda row: (abs(row.calls - calls), row.errors))
    return rows


def saved(path: pathlib.Path | None) -> dict[str, Any]:
    return json.loads(path.read_text()) if path is not None and path.is_file() else {}


def measured(job: Job, calls: int, args: argparse.Namespace, seed: int) -> Rows:
    """Measure, or read what --save holds of the same settings."""
    settings = f"{job.name} {calls} seed {seed} {args.schedule} {args.evaluations} {args.pairs} {args.repeats} {args.no_anneal}"
    jobs: dict[str, Callable[[], Rows]] = {f"{settings} ours": lambda: measure(job, calls, args, seed)}
    if args.comfyui and job.name.startswith("pocket"):
        host = args.comfyui.expanduser()
        jobs[f"{settings} host"] = lambda: measure_caches(job, host, calls, min(args.pairs, 8), seed)
    rows: Rows = {}
    for key, run in jobs.items():
        known = saved(args.save).get(key)
        found = run() if known is None else {name: Row(**row) for name, row in known.items()}
        rows |= found
        if args.save is not None and known is None:
            everything = {**saved(args.save), key: {name: asdict(row) for name, row in found.items()}}
            args.save.write_text(json.dumps(everything))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(MODELS), help=f"overhead, {', '.join(MODELS)}")
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 10])
    parser.add_argument(
        "--schedule", default="", help="the full run's schedule (default: karras, of flow models simple)"
    )
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-anneal", action="store_true", help="without BudCache's 220 evaluations")
    parser.add_argument("--comfyui", type=pathlib.Path, help="a checkout of the host, for EasyCache and LazyCache")
    parser.add_argument("--save", type=pathlib.Path, help="a JSON file that keeps what was measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "overhead" in args.what:
        for name in ("pocket", "pocket-flow"):
            overhead(name)
    for name in (name for name in args.what if name != "overhead"):
        for calls in args.calls:
            total: Rows = {}
            for seed in range(args.seeds):
                for method, row in measured(make_job(name, seed, args.schedule), calls, args, seed).items():
                    total.setdefault(method, Row(row.calls, row.evaluations)).join(row)
            print_table(f"{name}, {calls} of {STEPS} calls, {args.seeds} seeds", total)


if __name__ == "__main__":
    main()
