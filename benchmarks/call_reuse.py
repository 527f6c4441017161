"""Which network calls of 20 steps to leave out: the search against caches, plain steps and BudCache's annealing, at equal calls.

    python benchmarks/call_reuse.py                                  # bundled model and the exact mixtures, 6 and 10 of 20 calls
    python benchmarks/call_reuse.py ring digits --calls 3 4          # what the coefficients bring at very few calls
    python benchmarks/call_reuse.py pocket --calls 6 --seeds 3
    HOST/.venv/bin/python benchmarks/call_reuse.py pocket --comfyui HOST     # also EasyCache and LazyCache, the host's own nodes

Error: root mean square distance to the 20-step result from the same noise, over the result's own root mean square; 95 %
intervals over repeats on noise that nothing was searched on. "typical" is the median over single samples: one that falls into
another mode outweighs all others in a mean square. Caches have no budget: their threshold is bisected until they make as many
calls, and what they then made is printed. "captions" is the share of decoded images with every attribute of their caption.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _common  # noqa: F401 - makes the package importable
import torch
from _mixtures import digits, ring
from schedule_quality import captions
from slipstream.core import Conditioning, load
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

STEPS = 20
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
    right: Callable[[Tensor, Sequence[int]], float] | None = None  # share of latents of pairs that are as captioned


def relative(found: Tensor, full: Tensor) -> float:
    return float((found - full).pow(2).mean().sqrt() / full.pow(2).mean().sqrt())


def make_job(name: str, schedule: str, seed: int) -> Job:
    if name == "pocket":
        pipe = load("pocket")
        scenes, texts = captions(32, 11)
        path = ModelPath(
            pipe.model, pipe.encode_text(texts), pipe.encode_text([""]), cfg_scale=3.0, seed=seed, name=name
        )
        checker = reading.load_checker()

        def right(latents: Tensor, pairs: Sequence[int]) -> float:
            images = torch.cat([pipe.decode(part) for part in latents.split(16)])
            return reading.score(checker, images.movedim(-1, 1) * 2 - 1, [scenes[p % 32] for p in pairs])["all"]

        return Job(name, path, make_sigmas(schedule, path.model.levels, STEPS), right)
    model = ring() if name == "ring" else digits()
    path = ModelPath(model, Conditioning(torch.zeros(1, 1, 1)), size=model.size, seed=seed, batch=64, name=name)
    return Job(name, path, make_sigmas(schedule, path.model.levels, STEPS))


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


def measure(job: Job, calls: int, evaluations: int, batch: int, repeats: int, seed: int, anneal: bool) -> None:
    rows: dict[str, tuple[float, int, Callable[[Sequence[int]], Tensor]]] = {}
    full = tuple(job.sigmas.tolist())
    for name, fit in (("searched, fitted", None), ("searched, calls left out only", False)):
        config = SearchConfig(
            steps=STEPS, computed=calls, full=full, evaluations=evaluations, pairs=batch, holdout_pairs=2 * batch, seed=seed, fit=fit
        )  # fmt: skip
        result = search(job.path, config)
        rows[name] = (
            result.schedule.nfe,
            result.evaluations,
            scheduled(job, result.schedule.sigmas, result.schedule.reuse),
        )
    best = min(result.baselines, key=lambda name: result.baselines[name])
    stock = job.path.stock(calls)[best]
    rows[f"plain steps, best stock ({best})"] = calls, 0, scheduled(job, stock)
    rows[f"the same levels, fitted ({best})"] = (
        calls,
        1,
        scheduled(job, stock, fitted(job, stock, range(min(8, batch)))),
    )
    made, threshold = bisected(calls, lambda t: thresholded(job.path, job.sigmas, range(batch), t))
    rows["input threshold, residual"] = made, 0, lambda p: thresholded(job.path, job.sigmas, p, threshold)[1]
    skip = uniform_skip(calls)
    rows["uniform skip, residual"] = calls, 0, lambda p: residual(job.path, job.sigmas, p, skip)
    if anneal:
        chosen = annealed(job, calls, range(min(4, batch)), seed)
        rows["BudCache's annealing, residual"] = calls, 220, lambda p: residual(job.path, job.sigmas, p, chosen)
    print(f"\n{job.name}, {calls} of {STEPS} calls, seed {seed}")
    print(f"{'method':36} {'calls':>6} {'evaluations':>12}  {'error':16} {'typical':>8} {'captions':>9}")
    held = [list(range(HELD_OUT + i * batch, HELD_OUT + (i + 1) * batch)) for i in range(repeats)]
    truth = [job.path.sample(job.sigmas, pairs) for pairs in held]
    rows["full run"] = STEPS, 0, lambda p: job.path.sample(job.sigmas, p)
    for name, (made, tried, sample) in rows.items():
        found = [sample(pairs) for pairs in held]
        errors = str(interval([relative(f, t) for f, t in zip(found, truth)]))
        typical = torch.stack(
            [torch.tensor(relative(f, t)) for f, t in zip(torch.cat(found), torch.cat(truth))]
        ).median()
        seen = f"{100 * job.right(torch.cat(found), [p for pairs in held for p in pairs]):.0f} %" if job.right else ""
        print(f"{name:36} {made:6.3g} {tried or '':>12}  {errors:16} {typical:8.3g} {seen:>9}", flush=True)


def scheduled(job: Job, sigmas: Tensor, reuse: Sequence[ReuseSpan] = ()) -> Callable[[Sequence[int]], Tensor]:
    return lambda pairs: job.path.sample(sigmas, pairs, reuse=reuse)


def fitted(job: Job, sigmas: Tensor, pairs: Sequence[int]) -> tuple[ReuseSpan, ...]:
    """Return coefficients for the levels of a stock schedule: S4S as a second stage alone."""
    watch = Trajectory([], [], [])
    course = Course.of(watch, job.path.sample(job.sigmas, pairs, watch=watch))
    levels = sigmas.tolist()
    return Candidate(tuple(levels), weights=followed_weights(job.path, course, levels, 3, pairs)).reuse_spans()


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


def host_path(cache: Any, threshold: float, seed: int, text: str, counts: list[int]) -> SamplingPath:
    import comfy.samplers
    from slipstream.nodes.host.search_path import HostPath
    from slipstream.nodes.models import LoadModel

    model, clip, _ = LoadModel().load("pocket")
    encode = lambda t: clip.encode_from_tokens_scheduled(clip.tokenize(t))  # noqa: E731
    if cache is not None:
        model = cache.execute(model, threshold, 0.0, 1.0, False).args[0]
    counts.clear()
    forward = model.model.diffusion_model._forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return forward(*args, **kwargs)

    model.add_object_patch("diffusion_model._forward", counted)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(encode(text), encode(""))
    guider.set_cfg(3.0)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    return HostPath(guider, comfy.samplers.sampler_object("euler"), latent, seed)


def measure_caches(folder: pathlib.Path, schedule: str, calls: int, batch: int, seed: int) -> None:
    """Bisect each cache's threshold to `calls` calls on one prompt, and print its error."""
    nodes = in_host(folder)
    pairs, text, counts = list(range(HELD_OUT, HELD_OUT + batch)), captions(1, 11)[1][0], []
    sigmas = make_sigmas(schedule, load("pocket").model.levels, STEPS)
    full = host_path(None, 0, seed, text, counts).sample(sigmas, pairs)
    for name, node in nodes.items():

        def run(threshold: float, node: Any = node) -> tuple[float, Tensor]:
            found = host_path(node, threshold, seed, text, counts).sample(sigmas, pairs)
            return len(counts), found

        made, threshold = bisected(calls, run, 7)
        found = run(threshold)[1]
        typical = torch.tensor([relative(f, t) for f, t in zip(found, full)]).median()
        label = f"{name} (host), threshold {threshold:.3g}"
        print(f"{label:36} {made:6.3g} {'':>12}  {relative(found, full):<16.4g} {typical:8.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["pocket", "ring", "digits"], help="pocket, ring, digits")
    parser.add_argument("--calls", type=int, nargs="+", default=[6, 10])
    parser.add_argument("--schedule", default="karras", help="the full run's schedule")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-anneal", action="store_true", help="without BudCache's 220 evaluations")
    parser.add_argument("--comfyui", type=pathlib.Path, help="a checkout of the host, for EasyCache and LazyCache")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.what:
        for calls in args.calls:
            for seed in range(args.seeds):
                job = make_job(name, args.schedule, seed)
                measure(job, calls, args.evaluations, args.pairs, args.repeats, seed, not args.no_anneal)
                if args.comfyui and name == "pocket":
                    measure_caches(args.comfyui.expanduser(), args.schedule, calls, min(args.pairs, 8), seed)


if __name__ == "__main__":
    main()
