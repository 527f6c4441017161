"""Masked regeneration: rounds of patches re-noised and denoised while the rest is held. Inspired by LMD, with no speed claim.

A diffusion network cannot drop tokens, so masking saves nothing here: the cost is the sum of the steps over the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.checks import check_choice, check_finite, check_integer, check_latents, check_range, check_seed
from ..core.denoiser import Cond, Denoiser
from ..core.guidance import CFG, Denoise
from ..core.holding import held
from ..core.masks import as_mask, over, touched
from ..core.noise import NoiseSource, StackedNoise
from ..core.progress import Callback, Reporter, Step
from ..core.samplers import SAMPLERS, sample, start_scale
from ..core.schedules import SCHEDULES, make_sigmas
from ..core.tensors import blend
from .mask_schedule import DIRECTIONS, KINDS, mask_schedule


@dataclass(frozen=True)
class RegenerateConfig:
    """Settings of `regenerate`.

    Args:
        rounds: how many masks are regenerated one after the other.
        kind, low, high, direction, patch, nested, mask_seed: the masks, see `mask_schedule`.
        strength, strength_end: how far the masked patches are re-noised in the first and in the last round (0, 1].
        steps: network steps a round.
        sampler, schedule: names in `core.SAMPLERS` and `core.SCHEDULES`.
        cfg_scale: classifier-free guidance; 1 leaves the negative prompt out and halves the cost.
        candidates: tries a round, of which the one that explains the visible patches best is kept, image by image.
    """

    rounds: int = 4
    kind: str = "cosine"
    low: float = 0.15
    high: float = 0.75
    direction: str = "decreasing"
    patch: int = 2
    nested: bool = True
    mask_seed: int = 0
    strength: float = 0.6
    strength_end: float | None = None
    steps: int = 8
    sampler: str = "euler"
    schedule: str = "uniform"
    cfg_scale: float = 5.0
    candidates: int = 1

    def __post_init__(self) -> None:
        check_integer("rounds", self.rounds, 1, 1000)
        check_choice("kind", self.kind, KINDS)
        check_range("low", self.low, 0, 1)
        check_range("high", self.high, self.low, 1, "`high` must not be below `low`.")
        check_choice("direction", self.direction, DIRECTIONS)
        check_integer("patch", self.patch, 1)
        object.__setattr__(self, "mask_seed", check_seed("mask_seed", self.mask_seed))
        for name in ("strength", "strength_end"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0.01, 1)
        check_integer("steps", self.steps, 1, 1000)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_range("cfg_scale", self.cfg_scale, 0)
        check_integer("candidates", self.candidates, 1, 64)

    def strength_of(self, index: int, rounds: int) -> float:
        """Return the strength of round `index` from 0, linear from `strength` to `strength_end`."""
        end = self.strength if self.strength_end is None else self.strength_end
        return self.strength + (end - self.strength) * (index / (rounds - 1) if rounds > 1 else 0.0)


@dataclass(frozen=True)
class RegenerateResult:
    """`latents` (B, C, H, W); `masks` (rounds, B, H, W) as used; `errors` (rounds, B), how well the visible part was explained.

    The error is the mean squared distance between the model's own estimate and the held latents over the visible cells,
    averaged over the steps; 0 for a round that masked nothing or everything.
    """

    latents: Tensor
    masks: Tensor
    errors: Tensor


class Held:
    """A `Denoise` that sees and gives the known latents outside the mask, and sums up how badly the model explains them.

    See `core.holding.held`.
    """

    def __init__(self, denoise: Denoise, model: Denoiser, latents: Tensor, noise: Tensor, mask: Tensor) -> None:
        self.denoise, self.space, self.mask = denoise, model.space, mask
        self.latents, self.noise = latents, noise
        self.visible = (mask == 0).expand_as(latents).float()
        self.error = latents.new_zeros(len(latents))
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        # Kept here, the function would hold this object and the model with it until garbage is collected.
        return held(self._watched, self.space, self.latents, self.noise, lambda _: self.mask)(x, sigma)

    def _watched(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = self.denoise(x, sigma)
        squared = ((denoised - self.latents) ** 2 * self.visible).flatten(1).sum(1)
        self.error = self.error + squared / self.visible.flatten(1).sum(1).clamp(min=1)
        self.calls += 1
        return denoised


def regenerate(
    model: Denoiser[Cond],
    latents: Tensor,
    cond: Cond,
    uncond: Cond | None,
    config: RegenerateConfig,
    noise: NoiseSource,
    mask: Tensor | None = None,
    masks: Tensor | None = None,
    callback: Callback | None = None,
    sigmas_of: Callable[[float], Tensor] | None = None,
) -> RegenerateResult:
    """Return `latents` with random patches re-noised and denoised in rounds; what no mask touches is bit-exact.

    `latents` are (B, C, H, W), or (B, C, T, H, W) of a video: a mask holds in every frame.

    `mask` (B or 1, H, W), 1 = repaint, limits every round to a region. `masks` (rounds, H, W) replaces the schedule of the
    config. A round without masked cells costs nothing; any other costs steps * B * candidates rows, twice that with guidance.
    `sigmas_of` (strength -> steps + 1 descending levels) replaces the schedule of the config.
    An image of a batch is the same in a batch of any size, if it is so for `noise`.
    One round with ratio 1 is image to image at that strength with the same noise. Raises ValueError for NaN or bad shapes.
    """
    check_latents("latents", latents)
    check_finite("latents", latents)
    rounds = _round_masks(latents, config, mask, masks)
    busy = [bool(touched(m).any()) for m in rounds]
    report = Reporter(sum(busy) * config.steps, callback)
    guided = CFG(
        model, _rows(cond, len(latents), config), uncond and _rows(uncond, len(latents), config), config.cfg_scale
    )
    levels_of = sigmas_of or partial(make_sigmas, config.schedule, model.levels, config.steps)
    errors = latents.new_zeros(len(rounds), len(latents))
    for index, round_mask in enumerate(rounds):
        if busy[index]:
            sigmas = levels_of(config.strength_of(index, len(rounds))).to(latents.device)
            latents, errors[index] = _one_round(
                model, guided, latents, over(round_mask, latents), sigmas, index, config, noise, report
            )
    return RegenerateResult(latents, rounds, errors)


def _rows(cond: Cond, batch: int, config: RegenerateConfig) -> Cond:
    """Return `cond` for candidate-major rows: all images of the first candidate, then of the next."""
    return cond if cond.rows == 1 else cond.expand(batch).take(list(range(batch)) * config.candidates)


def _round_masks(latents: Tensor, config: RegenerateConfig, mask: Tensor | None, masks: Tensor | None) -> Tensor:
    """Return the masks (rounds, B, H, W) of all rounds."""
    batch, height, width = len(latents), *latents.shape[-2:]
    region = None if mask is None else as_mask(mask, batch, height, width).to(latents)
    if masks is not None:
        rounds = as_mask(masks, len(masks), height, width, "masks")
    else:
        union = None if region is None else touched(region.amax(0)).float()
        rounds = mask_schedule(
            config.rounds, config.kind, config.low, config.high, config.direction, config.patch, config.mask_seed,
            config.nested, height, width, union,
        ).masks  # fmt: skip
    rounds = rounds.to(latents)[:, None].expand(-1, batch, -1, -1)
    return rounds if region is None else rounds * region


def _one_round(
    model: Denoiser, guided: Denoise, latents: Tensor, mask: Tensor, sigmas: Tensor, index: int, config: RegenerateConfig,
    noise: NoiseSource, report: Reporter,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Re-noise and denoise one mask that broadcasts over `latents`; return the latents and the visible error (B,) of the kept candidate."""
    first = noise(latents)
    # Candidates differ inside the mask only, so that their visible errors compare what they painted and nothing else.
    others = noise.fork(f"candidates {index}")
    draws = [first, *(blend(first, others(latents), mask) for _ in range(config.candidates - 1))]
    known, hidden = (t.repeat(config.candidates, *[1] * (t.ndim - 1)) for t in (latents, mask))
    problem = Held(guided, model, known, torch.cat(draws), hidden)

    def forward(step: Step) -> None:
        report(f"round {index + 1}", step.sigma, None if step.denoised is None else step.denoised[: len(latents)])

    top = float(sigmas[0])
    start = model.space.add_noise(known, problem.noise * (start_scale(model, top) / top), top)
    x = sample(
        config.sampler, problem, start, sigmas, model.space, _sampler_noise(noise, index, config.candidates), forward
    )
    # The last estimate is blended already; a second blend would count a soft mask twice.
    results = torch.where(hidden == 0, known, x).unflatten(0, (config.candidates, -1))
    error = (problem.error / problem.calls).unflatten(0, (config.candidates, -1))
    best, rows = error.argmin(0), torch.arange(len(latents), device=latents.device)
    return results[best, rows], error[best, rows]


def _sampler_noise(noise: NoiseSource, index: int, candidates: int) -> NoiseSource:
    """Return the sampler's noise for candidate-major rows: a source for each candidate, so that batch and number do not count."""
    first = noise.fork(f"sampler {index}")
    return first if candidates == 1 else StackedNoise([first, *(first.fork(f"{c}") for c in range(1, candidates))])
