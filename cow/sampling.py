"""Cyclic One-Way Diffusion from canvas to result: invert, cycle, finish."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.cache import INVERSIONS
from ..core.checks import check_finite, check_latents
from ..core.denoiser import Cond, Denoiser, NoiseSpace
from ..core.guidance import CFG, Denoise, own_guidance
from ..core.identity import has_identity, identify
from ..core.masks import as_mask, over
from ..core.noise import NoiseSource
from ..core.progress import Callback, Reporter
from ..core.schedules import make_sigmas
from .config import CowConfig, Plan, as_levels, make_plan
from .cycle import MaskedCFG, Subject, around, cycle, descend, down, make_repel
from .invert import invert, limit_noise


@dataclass(frozen=True)
class CowResult:
    """The finished `latents` (B, C, H, W), and the clean estimate at the end of each cycle (none when all is kept)."""

    latents: Tensor
    cycles: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def generate(
    model: Denoiser[Cond], canvas_latents: Tensor, keep_mask: Tensor, cond: Cond, uncond: Cond | None,
    config: CowConfig, noise: NoiseSource, callback: Callback | None = None, *, sigmas: Tensor | None = None,
    suppress: Cond | None = None, enhance: Cond | None = None, denoise: Denoise | None = None,
    denoise_where: Callable[[Tensor], Denoise] | None = None, redraw: Callable[[Tensor], Tensor] | None = None,
) -> CowResult:  # fmt: skip
    """Keep the subject of a canvas and grow a scene around it (Cyclic One-Way Diffusion, arXiv 2306.08247).

    Args:
        canvas_latents: clean latents (B, C, H, W) of the subject on its background, or (B, C, T, H, W) of a video: the mask holds
            in every frame.
        keep_mask: (B or 1, H', W') in [0, 1] of any size, 1 = keep; soft values hold a cell for that share of the levels.
        cond, uncond: prompt and negative prompt, 1 or B rows; `uncond` None samples without guidance.
        noise: every random number of the run.
        sigmas: descending levels (S+1,) ending in 0, in place of `config.steps` and `config.schedule`.
        suppress, enhance: the background is pushed away from the one and towards the other.
        denoise: a guided estimate of your own in place of classifier-free guidance at `config.cfg_scale`.
        denoise_where: `denoise_where(mask)` is `denoise` at guidance 1 where the mask (B, 1, H, W) is 1: around the subject at last.
        redraw: `redraw(denoised)` is the scene's clean estimate with the subject's pixels in it (`canvas.on_scene`), encoded again; asked
            once, before the last descent, so that the subject grows less. No effect where the subject is let go before the end.

    Raises ValueError for latents or a mask that are not finite, an empty mask, a batch that does not match, and sigmas
    that do not descend or leave no step between `low` and `high`.
    """
    check_latents("canvas_latents", canvas_latents, remedy="Encode the canvas with the model's VAE.")
    check_finite("canvas_latents", canvas_latents)
    sigmas = make_sigmas(config.schedule, model.levels, config.steps) if sigmas is None else sigmas.detach().cpu()
    plan = make_plan(config, model.levels, sigmas)
    keep = latent_mask(keep_mask, canvas_latents, plan)
    levels, space = as_levels(plan.levels, canvas_latents), model.space
    whole = bool((keep >= plan.threshold(plan.stop)).all())
    # All kept: whatever is sampled above the last replacement would be overwritten there, so start at that level.
    top, start = (plan.stop, plan.stop) if whole else (plan.inverted, plan.low)
    report = Reporter(2 * plan.stop if whole else plan.total, callback)

    path = _inversion(model, cond, uncond, config.inversion_cfg, canvas_latents, levels[: top + 1], report)
    kept = limit_noise(path, keep, levels, space, config.noise_limit)
    last = Subject(kept if whole else lifted(kept, levels, space), keep, plan)
    # Until the last descent the subject informs its surroundings down to `low`.
    subject = replace(last, plan=replace(plan, stop=min(plan.stop, plan.low)))

    if denoise is None:
        denoise = CFG(model, cond, uncond, config.cfg_scale)
        denoise_where = partial(MaskedCFG, model, cond, uncond, config.cfg_scale)
    from_noise = config.start == "noise" and not whole
    free = denoise_where(around(keep)) if denoise_where is not None and from_noise else denoise
    guided = make_repel(model, cond, uncond, config, keep, suppress, enhance) or denoise
    x, estimates = last.latents[start], []
    if from_noise:
        x = _from_noise(guided, canvas_latents, subject, levels, space, config.eta, noise.fork("cow start"), report)
    for index in [] if whole else range(config.cycles):
        fresh, held = noise.fork(f"cow cycle {index}"), last if index == config.cycles - 1 else subject
        x, denoised = cycle(guided, x, held, levels, space, config.eta, fresh, report, f"cycle {index + 1}")
        estimates.append(denoised)

    if redraw is not None and estimates and plan.stop == 0:
        scene = space.noise_of(x, estimates[-1], levels[plan.low])
        last = last.redrawn(redraw(estimates[-1]), scene, firmest(keep_mask, canvas_latents), levels, space)
        x = last.put_back(x, plan.low)
    return CowResult(_last_descent(free, x, last, start, levels, space, config.final_eta, noise, report), estimates)


def _from_noise(
    denoise: Denoise, canvas: Tensor, subject: Subject, levels: Tensor, space: NoiseSpace, eta: float, noise: NoiseSource,
    report: Reporter,
) -> Tensor:  # fmt: skip
    """Return `x` at level `low` after a first descent from noise around the subject."""
    plan = subject.plan
    x = subject.put_back(space.add_noise(canvas, noise(canvas), levels[plan.top]), plan.top)
    return down(denoise, x, subject, levels, range(plan.top, plan.low, -1), space, eta, noise, report, "start")[0]


def _last_descent(
    denoise: Denoise, x: Tensor, subject: Subject, start: int, levels: Tensor, space: NoiseSpace, eta: float, noise: NoiseSource,
    report: Reporter,
) -> Tensor:  # fmt: skip
    """Return clean `x` from level `start`; the subject is put back until its plan lets it go."""
    for step in range(start, 0, -1):
        x, denoised = descend(denoise, x, levels, step, space, eta, noise.fork(f"cow final {step}"))
        x = subject.put_back(x, step - 1) if step > subject.plan.stop else x
        report("sample", levels[step - 1], denoised)
    return x


def lifted(path: list[Tensor], levels: Tensor, space: NoiseSpace) -> list[Tensor]:
    """Return inverted latents at all `levels`: above those of `path` the last noise stays."""
    known = len(path) - 1
    noise = space.noise_of(path[known], path[0], levels[known])
    return [*path, *(space.add_noise(path[0], noise, level) for level in levels[known + 1 :])]


def _inversion(
    model: Denoiser[Cond], cond: Cond, uncond: Cond | None, cfg_scale: float, latents: Tensor, levels: Tensor,
    report: Reporter,
) -> list[Tensor]:  # fmt: skip
    """Return `invert`'s path, from the cache when nothing that it depends on has changed (models without `identity`: never)."""
    asked = cfg_scale != 1 or own_guidance(model) is not None
    guided = CFG(model, cond, uncond if asked else None, cfg_scale)
    # The cache outlives the caller's tensor, which may be written to.
    build = lambda: invert(guided, latents.clone(), levels, model.space, report)  # noqa: E731
    if not has_identity(model):
        return build()
    path = INVERSIONS.get(identify("cow", model, latents, levels, guided.cond, guided.uncond, cfg_scale), build)
    report.index = len(levels) - 1  # steps found in the cache count as done: the total stays the same
    return [x.to(latents) for x in path]  # the cache may know them from another device


def latent_mask(keep_mask: Tensor, latents: Tensor, plan: Plan) -> Tensor:
    """Return the keep mask on the grid of `latents` as (B, 1, H, W), or (B, 1, 1, H, W) for a video; raises ValueError if one is empty."""
    keep = as_mask(keep_mask, len(latents), latents.shape[-2], latents.shape[-1], "keep_mask")
    keep = over(keep, latents).to(latents)
    empty = _rows((keep < plan.threshold(plan.high)).flatten(1).all(1))
    if empty:
        raise ValueError(
            f"Expected `keep_mask` with at least one kept cell, but got an empty mask in row {', '.join(empty)}. "
            "Paint the subject (1 = keep)."
        )
    return keep


def firmest(keep_mask: Tensor, latents: Tensor) -> Tensor:
    """Return the highest value of the keep mask in each cell of `latents`, in the shape of `latent_mask`'s."""
    height, width = keep_mask.shape[-2:]
    pixels = as_mask(keep_mask, len(latents), height, width, "keep_mask")
    return over(F.adaptive_max_pool2d(pixels, latents.shape[-2:]), latents).to(latents)


def _rows(flags: Tensor) -> Iterable[str]:
    return [str(int(i)) for i in torch.nonzero(flags).flatten()]
