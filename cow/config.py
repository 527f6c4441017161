"""What a run of Cyclic One-Way Diffusion is asked to do, and the noise levels that this comes to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_choice, check_integer, check_range, check_sigmas
from ..core.schedules import SCHEDULES, Levels, nearest_step, sigma_at

UNITS = ("time", "sigma")
STARTS = ("noise", "canvas")
TOP = 0.9


@dataclass(frozen=True)
class CowConfig:
    """Settings of Cyclic One-Way Diffusion (arXiv 2306.08247).

    Args:
        steps, schedule: the levels of the run, unless `generate` is given `sigmas`.
        cfg_scale: guidance of the cycles and the final phase.
        inversion_cfg: guidance of the inversion. The published 7.5 drifts on real photos; 1 costs half.
        cycles: how often the scene is disturbed and reconstructed. From "noise" 1 suffices; from "canvas" 1 leaves the background
            visible, and 3 to 10 suffice.
        low, high: the cycles run between these levels. As "time", fractions of the training time (0 clean, 1 pure noise):
            0.4 to 0.6 is what the published 0.5 to 0.7 of the steps comes to once every latent carries the level the
            sampler believes in. As "sigma", noise levels of the model itself.
        unit: "time" or "sigma".
        eta, final_eta: variance of the fresh noise in the cycles and in the final phase, 0 deterministic, 1 ancestral.
        preserve: the share of the final steps in which the subject is put back: 1 all (its latents end exact), 0 none (it
            follows the prompt from there on). The published code puts it back once, at 0.2.
        noise_limit: the subject's inverted noise is scaled back to this root mean square per channel where it is stronger.
        repel: weight of the optional `suppress` and `enhance` conditionings.
        start: "noise": the scene comes down from the top of the levels around the subject, then cycles. "canvas": it starts as the
            inverted canvas at `low`, as published, and keeps something of the canvas's background.
        follow: the dial between the pixels kept (0) and the text followed (1): the share of the levels up to `high` in which the
            subject is let go in the last descent. Above 0 it takes the place of `preserve`.
    """

    steps: int = 20
    schedule: str = "leading"
    cfg_scale: float = 7.5
    inversion_cfg: float = 1.0
    cycles: int = 1
    low: float = 0.4
    high: float = 0.6
    unit: str = "time"
    eta: float = 1.0
    final_eta: float = 0.1
    preserve: float = 1.0
    noise_limit: float = 1.0
    repel: float = 1.0
    start: str = "noise"
    follow: float = 0.0

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 1, 1000)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_range("cfg_scale", self.cfg_scale, 0, 100)
        check_range("inversion_cfg", self.inversion_cfg, 0, 100)
        check_integer("cycles", self.cycles, 1, 1000)
        check_choice("unit", self.unit, UNITS)
        top = 1.0 if self.unit == "time" else 1000.0
        check_range("low", self.low, 0, top)
        check_range("high", self.high, 0, top)
        if self.low >= self.high:
            raise ValueError(f"Expected `low` below `high` {self.high}, but got {self.low}. Swap or widen them.")
        check_range("eta", self.eta, 0, 1)
        check_range("final_eta", self.final_eta, 0, 1)
        check_range("preserve", self.preserve, 0, 1)
        check_range("noise_limit", self.noise_limit, 0.01, 1000)
        check_range("repel", self.repel, 0, 100)
        check_choice("start", self.start, STARTS)
        check_range("follow", self.follow, 0, 1)


@dataclass(frozen=True)
class Plan:
    """The levels of a run, counted from the clean end: levels[0] = 0, levels[high] is where the cycles start.

    `low` < `high` bound the cycles; the subject is put back in the last descent at each level down to `stop` <= `high`. The scene
    starts at `top`, `low` or the last level.
    """

    levels: tuple[float, ...]
    low: int
    high: int
    stop: int
    cycles: int
    top: int

    @property
    def total(self) -> int:
        """Denoising steps of a whole run, inversion included."""
        return self.inverted + self.top - self.low + self.cycles * (self.high - self.low) + self.low

    @property
    def inverted(self) -> int:
        """How far up the canvas is inverted: the highest levels of a scene that starts as noise take the noise of the level below."""
        return self.high if self.top == self.low else max(1, self.high - 1)

    def threshold(self, step: int) -> float:
        """Return the mask value from which a cell is put back at `step`: low at high noise, nearly 1 at the last.

        So a soft mask holds a cell for its share of the levels (as arXiv 2306.00950 does), and what is put back always
        carries exactly the noise level of its surroundings: mixing two noisy latents linearly would lower it.
        """
        return (max(0, self.high - step) + 0.5) / (self.high - self.stop + 1)


def make_plan(config: CowConfig, levels: Levels, sigmas: Tensor) -> Plan:
    """Find the levels of `config` in descending `sigmas` (S+1,) that end in 0.

    Raises ValueError for sigmas that do not descend or end above 0, and when no step lies within the range.
    """
    check_sigmas("sigmas", sigmas)
    if sigmas[-1] != 0:
        raise ValueError(
            f"Expected `sigmas` that end in 0, but got {float(sigmas[-1]):.4g}. Give the whole schedule, not a part of it."
        )
    low, high = (len(sigmas) - 1 - nearest_step(sigmas, level) for level in _range(config, levels))
    if low >= high:
        raise _empty_range(config, levels, sigmas)
    _check_top(config, levels, float(sigmas[len(sigmas) - 1 - high]))
    stop = round(config.follow * high) if config.follow > 0 else low - round(config.preserve * low)
    top = len(sigmas) - 1 if config.start == "noise" else low
    return Plan(tuple(sigmas.flip(0).tolist()), low, high, stop, config.cycles, top)


def _range(config: CowConfig, levels: Levels) -> tuple[float, float]:
    if config.unit == "sigma":
        return config.low, config.high
    return sigma_at(levels, config.low), sigma_at(levels, config.high)


def _check_top(config: CowConfig, levels: Levels, sigma: float) -> None:
    """Refuse to invert into pure noise: there the latents hold nothing of the subject, and the steps are too long to be exact."""
    top = sigma_at(levels, TOP)
    if sigma > top:
        raise ValueError(
            f"Expected `high` at a noise level of at most {top:.3g} ({TOP} of the training time), but got {sigma:.3g} "
            f"(`high` {config.high}). Lower it; 0.6 is the default."
        )


def _empty_range(config: CowConfig, levels: Levels, sigmas: Tensor) -> ValueError:
    low, high = _range(config, levels)
    shown = ", ".join(f"{float(s):.3g}" for s in sigmas[:8]) + (", ..." if len(sigmas) > 8 else "")
    return ValueError(
        f"Expected `sigmas` with at least one step between noise levels {low:.3g} (`low` {config.low}) and {high:.3g} "
        f"(`high` {config.high}), but got none in {len(sigmas) - 1} steps ({shown}). Use more steps or widen the range."
    )


def as_levels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return levels as a tensor on the device of `like`, in float32."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)
