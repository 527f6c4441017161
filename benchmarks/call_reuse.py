"""Which network calls of 20 steps to leave out: the search against caches, plain steps and BudCache's annealing, at equal calls.

    python benchmarks/call_reuse.py                                  # bundled model and the exact mixtures, 6 and 10 of 20 calls
    python benchmarks/call_reuse.py pocket --calls 6 --seeds 3
    HOST/.venv/bin/python benchmarks/call_reuse.py pocket --comfyui HOST     # also EasyCache and LazyCache, the host's own nodes

Error: root mean square distance to the 20-step result from the same noise, over the result's own root mean square; 95 %
intervals over repeats on noise that nothing was searched on. EasyCache and LazyCache have no budget: their threshold is
bisected until they make as many calls, and what they then made is printed.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _common
import torch
from _mixtures import digits, ring
from schedule_quality import captions
from slipstream.core import Conditioning, load
from slipstream.core.reuse import CallReuse
from slipstream.core.schedules import make_sigmas
from slipstream.search import ModelPath, SearchConfig, search
from slipstream.search.comparison import interval
from slipstream.search.paths import SamplingPath
from torch import Tensor

STEPS = 20
HELD_OUT = 1_000_000  # first pair of the measurement


class ResidualReuse(CallReuse):
    """Keeps the residual denoised - x of the last call, as residual caches do (same bookkeeping as ours)."""

    def _slope(self, sigma: float, kind: str) -> Tensor:
        last_sigma, last = self._slopes[-1]
        return last * (last_sigma / sigma)


@dataclass
class Job:
    """One model as a user samples it, with its full run."""

    name: str
    path: ModelPath
    sigmas: Tensor

    def error(self, sigmas: Tensor, pairs: Sequence[int], **how: Any) -> float:
        return relative(self.path.sample(sigmas, pairs, **how), self.path.sample(self.sigmas, pairs))


def relative(found: Tensor, full: Tensor) -> float:
    return float((found - full).pow(2).mean().sqrt() / full.pow(2).mean().sqrt())


def make_job(name: str, schedule: str, seed: int) -> Job:
    if name == "pocket":
        pipe = load("pocket")
        cond, uncond = pipe.encode_text(captions(32, 11)[1]), pipe.encode_text([""])
        path = ModelPath(pipe.model, cond, uncond, cfg_scale=3.0, seed=seed, name=name)
    else:
        model = ring() if name == "ring" else digits()
        path = ModelPath(model, Conditioning(torch.zeros(1, 1, 1)), size=model.size, seed=seed, batch=64, name=name)
    return Job(name, path, make_sigmas(schedule, path.model.levels, STEPS))


def euler(path: ModelPath, sigmas: Tensor, pairs: Sequence[int], computed: Sequence[int]) -> Tensor:
    """Sample with the residual of the last call kept in every step that is not in `computed`."""
    spans = [span(sigmas, i) for i in range(len(sigmas) - 1) if i not in computed]
    import slipstream.search.paths as paths

    plain = paths.reusing

    def residual(denoise: Callable[[Tensor, Tensor], Tensor], spans: Any) -> Callable[[Tensor, Tensor], Tensor]:
        reuse = ResidualReuse(spans)
        return lambda x, sigma: reuse(denoise, x, torch.as_tensor(sigma))

    paths.reusing = residual
    try:
        return path.sample(sigmas, pairs, reuse=spans)
    finally:
        paths.reusing = plain


def span(sigmas: Tensor, i: int) -> Any:
    from slipstream.core.reuse import ReuseSpan

    return ReuseSpan(float(sigmas[i]), float(sigmas[i + 1]), "last")


def uniform_skip(calls: int) -> list[int]:
    return sorted({round(i * STEPS / calls) for i in range(calls)})


def annealed(job: Job, calls: int, pairs: Sequence[int], seed: int) -> list[int]:
    """BudCache's search (arXiv 2606.13496): 200 trials of annealing and 20 of hill climbing over which steps compute."""
    rng = random.Random(seed)
    full = job.path.sample(job.sigmas, pairs)
    score = lambda c: float((euler(job.path, job.sigmas, pairs, c) - full).pow(2).mean())  # noqa: E731

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
    rows: dict[str, tuple[float, Callable[[Sequence[int]], Tensor], int]] = {}
    full = tuple(job.sigmas.tolist())
    config = SearchConfig(
        steps=STEPS, computed=calls, full=full, evaluations=evaluations, pairs=batch, holdout_pairs=batch, seed=seed
    )
    _common.OUT.mkdir(parents=True, exist_ok=True)
    result = search(job.path, config, store=_common.OUT / f"reuse_{job.name}_{calls}_{seed}.sqlite")
    found = result.schedule
    rows["searched"] = (found.nfe, lambda p: job.path.sample(found.sigmas, p, reuse=found.reuse), result.evaluations)
    best = min(result.baselines, key=lambda name: result.baselines[name])
    stock = job.path.stock(calls)[best]
    rows[f"plain steps, best stock ({best})"] = (calls, lambda p: job.path.sample(stock, p), 0)
    skip = uniform_skip(calls)
    rows["uniform skip, residual"] = (calls, lambda p: euler(job.path, job.sigmas, p, skip), 0)
    if anneal:
        chosen = annealed(job, calls, range(min(4, batch)), seed)
        rows["BudCache's annealing, residual"] = (calls, lambda p: euler(job.path, job.sigmas, p, chosen), 220)
    print(f"\n{job.name}, {calls} of {STEPS} calls, seed {seed}")
    print(f"{'method':36} {'calls':>6} {'evaluations':>12}  error")
    held = [list(range(HELD_OUT + i * batch, HELD_OUT + (i + 1) * batch)) for i in range(repeats)]
    truth = [job.path.sample(job.sigmas, pairs) for pairs in held]
    for name, (made, sample, tried) in rows.items():
        errors = interval([relative(sample(pairs), full) for pairs, full in zip(held, truth)])
        print(f"{name:36} {made:6g} {tried or '':>12}  {errors}", flush=True)


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
        low, high, tried = 0.0, 3.0, []
        for _ in range(10):
            threshold = (low + high) / 2
            found = host_path(node, threshold, seed, text, counts).sample(sigmas, pairs)
            tried.append((abs(len(counts) - calls), len(counts), threshold, relative(found, full)))
            low, high = (threshold, high) if len(counts) > calls else (low, threshold)
        _, made, threshold, error = min(tried)
        print(f"{f'{name} (host), threshold {threshold:.3g}':36} {made:6g} {'':>12}  {error:.4g}", flush=True)


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
                    measure_caches(args.comfyui.expanduser(), args.schedule, calls, args.pairs, seed)


if __name__ == "__main__":
    main()
