"""Noise levels: sigma <-> timestep for a model, and the standard descending schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .checks import check_choice, check_integer, check_range, shown

TRAIN_STEPS = 1000


class Levels(Protocol):
    """The noise levels that a model was trained on.

    Time is counted in training steps, of which there are 1000, whatever timestep the network gets: 0 or 1 at `sigma_min`, 999 or 1000 at
    `sigma_max`.
    """

    sigma_min: float
    sigma_max: float

    def t_to_sigma(self, timestep: Tensor) -> Tensor:
        """Return the noise level of (fractional) training timesteps."""
        ...

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Return the (fractional) training timestep of noise levels."""
        ...


class DiscreteLevels:
    """Levels of a model with a table of alphas_cumprod (T,): sigma = sqrt((1 - abar) / abar), log-linear between entries.

    `quantize` is whether `sigma_to_t` rounds to the nearest entry in log sigma, as the host (and k-diffusion's DiscreteSchedule
    by default) does. Without it a network is asked at the exact level. Levels of the table itself, all that a schedule search
    tries, have the same timestep either way; those of karras, exponential or an interpolated schedule move by up to half a step.
    """

    def __init__(self, alphas_cumprod: Tensor, quantize: bool = False) -> None:
        self.quantize = quantize
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        # A zero-terminal-SNR table ends in abar = 0; the host puts the same small number there.
        abar = torch.where(abar < 1e-12, 4.8973451890853435e-08, abar)
        self.sigmas = ((1 - abar) / abar).sqrt()  # (T,) ascending, float64
        self.log_sigmas = self.sigmas.log()
        self.sigma_min = float(self.sigmas[0])
        self.sigma_max = float(self.sigmas[-1])

    def __len__(self) -> int:
        return len(self.sigmas)

    def t_to_sigma(self, timestep: Tensor) -> Tensor:
        t = torch.as_tensor(timestep).detach().to("cpu", torch.float64).clamp(0, len(self.sigmas) - 1)
        low, frac = t.floor().long(), t.frac()
        high = t.ceil().long()
        log_sigma = self.log_sigmas[low] * (1 - frac) + self.log_sigmas[high] * frac
        return log_sigma.exp().to(torch.float32)

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """Return the timestep of `sigma`, rounded to an entry of the table if `quantize` (None: as the levels were made)."""
        sigma = torch.as_tensor(sigma)
        log_sigma = sigma.detach().to("cpu", torch.float64).clamp(min=1e-12).log()
        high = torch.searchsorted(self.log_sigmas, log_sigma).clamp(1, len(self.sigmas) - 1)
        low = high - 1
        span = self.log_sigmas[high] - self.log_sigmas[low]
        t = low + ((log_sigma - self.log_sigmas[low]) / span).clamp(0, 1)
        # A float32 sigma of a table entry must give its integer timestep back: the network's time embedding shows 1e-3.
        nearest = t.round()
        snap = 0.5 if (self.quantize if quantize is None else quantize) else 1e-3
        return torch.where((t - nearest).abs() <= snap, nearest, t).to(sigma.device, torch.float32)


class FlowLevels:
    """Levels of a rectified flow with shift: sigma = shift * u / (1 + (shift - 1) u), u = timestep / T (arXiv 2403.03206 eq. 23)."""

    def __init__(self, shift: float = 1.0, train_steps: int = TRAIN_STEPS) -> None:
        check_range("shift", shift, 1e-3)
        self.shift = shift
        self.train_steps = train_steps
        self.sigma_min = float(self.t_to_sigma(torch.tensor(1.0)))
        self.sigma_max = 1.0

    def t_to_sigma(self, timestep: Tensor) -> Tensor:
        u = torch.as_tensor(timestep, dtype=torch.float32) / self.train_steps
        return self.shift * u / (1 + (self.shift - 1) * u)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32)
        return self.train_steps * sigma / (self.shift - (self.shift - 1) * sigma)


def scaled_linear_betas(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


def linear_betas(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)


def cosine_betas(start: float, end: float, steps: int) -> Tensor:
    """Return the betas of abar = cos^2((u + 0.008) / 1.008 * pi / 2), at most 0.999 (arXiv 2102.09672 eq. 17)."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    abar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


# beta_schedule of a diffusers scheduler: (beta_start, beta_end, T) -> betas (T,)
BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "scaled_linear": scaled_linear_betas,
    "linear": linear_betas,
    "squaredcos_cap_v2": cosine_betas,
}


def scaled_linear_alphas_cumprod(
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = TRAIN_STEPS
) -> Tensor:
    """Return Stable Diffusion's alphas_cumprod (T,) in float32."""
    return torch.cumprod(1 - scaled_linear_betas(beta_start, beta_end, steps), 0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return the table (T,) shifted and scaled so that its last level is pure noise (arXiv 2305.08891 alg. 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


# What schedulers of diffusers take where their config says nothing: (beta_schedule, beta_start, beta_end); others DDPM's.
DDPM_BETAS = ("linear", 0.0001, 0.02)
DEFAULT_BETAS = {
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("scaled_linear", 0.00085, 0.012)),
    **dict.fromkeys(
        ("DPMSolverSDEScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        ("linear", 0.00085, 0.012),
    ),
}


def alphas_cumprod_of(config: Mapping[str, Any]) -> Tensor:
    """Return alphas_cumprod (T,) of a diffusers scheduler config, with diffusers' own defaults for what it does not say.

    Raises ValueError for a schedule that is not known.
    """
    default = DEFAULT_BETAS.get(config.get("_class_name", ""), DDPM_BETAS)
    kind, start, end = (config.get(f"beta_{name}", value) for name, value in zip(("schedule", "start", "end"), default))
    check_choice("beta_schedule", kind, BETAS, "Load an SD1.5, SD2.x or SDXL model.")
    given = config.get("trained_betas")
    steps = config.get("num_train_timesteps", TRAIN_STEPS)
    check_integer("num_train_timesteps", steps, 2, 1_000_000, "The scheduler's config is damaged.")
    betas = BETAS[kind](start, end, steps) if given is None else torch.tensor(given)
    alphas = torch.cumprod(1 - betas.float(), 0)
    if alphas.ndim != 1 or len(alphas) < 2 or not bool(((betas > 0) & (betas < 1)).all()) or not alphas[-1] > 0:
        raise ValueError(
            f"Expected betas between 0 and 1 in the scheduler's config, but got {shown(start)} to {shown(end)} in {steps} steps. "
            "Download the config again."
        )
    return zero_terminal_snr(alphas) if config.get("rescale_betas_zero_snr") else alphas


def sigma_at(levels: Levels, fraction: float) -> float:
    """Return the level at `fraction` of training time, 0 = clean, 1 = pure noise."""
    check_range("fraction", fraction, 0, 1)
    return float(levels.t_to_sigma(torch.tensor(fraction * _last_and_first(levels)[0])))


def nearest_step(sigmas: Tensor, sigma: float) -> int:
    """Return the index into descending `sigmas` of the level closest to `sigma` in log scale."""
    target = math.log(max(sigma, 1e-10))
    return int((sigmas.clamp(min=1e-10).log() - target).abs().argmin())


def with_zero(sigmas: Tensor) -> Tensor:
    """Append the terminal 0."""
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def from_timesteps(levels: Levels, timesteps: Tensor | list[int]) -> Tensor:
    """Return descending sigmas with a terminal 0 for a descending list of training timesteps."""
    return with_zero(levels.t_to_sigma(torch.as_tensor(timesteps, dtype=torch.float64)))


def _last_and_first(levels: Levels) -> tuple[float, float]:
    ends = levels.sigma_to_t(torch.tensor([levels.sigma_max, levels.sigma_min], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def uniform(levels: Levels, steps: int) -> Tensor:
    """Evenly spaced timesteps from the last to the first, both included (the host's "normal")."""
    return from_timesteps(levels, torch.linspace(*_last_and_first(levels), steps, dtype=torch.float64))


def sgm_uniform(levels: Levels, steps: int) -> Tensor:
    """Evenly spaced timesteps from the last, the first left out (trailing spacing: the last step jumps to clean)."""
    return from_timesteps(levels, torch.linspace(*_last_and_first(levels), steps + 1, dtype=torch.float64)[:-1])


def leading(levels: Levels, steps: int) -> Tensor:
    """DDIM's timesteps 1 + k * (1000 // steps), descending (arXiv 2010.02502, with Stable Diffusion's offset of 1)."""
    stride = TRAIN_STEPS // steps
    offset = min(1, round(_last_and_first(levels)[0]) - (steps - 1) * stride)
    return from_timesteps(levels, [offset + k * stride for k in reversed(range(steps))])


def simple(levels: Levels, steps: int) -> Tensor:
    """Every (1000 / steps)-th timestep counted down from the last, rounded down."""
    last = round(_last_and_first(levels)[0])
    return from_timesteps(levels, [last - int(k * (last + 1) / steps) for k in range(steps)])


def karras(levels: Levels, steps: int, rho: float = 7.0) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho) (arXiv 2206.00364 eq. 5)."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = levels.sigma_max ** (1 / rho), levels.sigma_min ** (1 / rho)
    return with_zero(((high + ramp * (low - high)) ** rho).float())


def exponential(levels: Levels, steps: int) -> Tensor:
    """Levels evenly spaced in log sigma."""
    ends = math.log(levels.sigma_max), math.log(levels.sigma_min)
    return with_zero(torch.linspace(*ends, steps, dtype=torch.float64).exp().float())


def kl_optimal(levels: Levels, steps: int) -> Tensor:
    """Levels evenly spaced in arctan(sigma): the optimum for isotropic Gaussian data (arXiv 2404.14507 theorem 3.1)."""
    if steps == 1:
        return with_zero(torch.tensor([levels.sigma_max]))
    ends = math.atan(levels.sigma_max), math.atan(levels.sigma_min)
    return with_zero(torch.linspace(*ends, steps, dtype=torch.float64).tan().float())


# Ten steps for Stable Diffusion 1.5 and XL as training timesteps, the published lists of Align Your Steps
# (arXiv 2404.14507, https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html). The last level is the one the
# lists end at before clean.
ALIGN_YOUR_STEPS: dict[str, tuple[int, ...]] = {
    "ays_sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "ays_sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


def align_your_steps(levels: Levels, steps: int, table: str = "ays_sd15") -> Tensor:
    """The published list for `table`, interpolated log-linearly to `steps` as its authors do (arXiv 2404.14507)."""
    check_choice("table", table, ALIGN_YOUR_STEPS)
    listed = levels.t_to_sigma(torch.tensor(ALIGN_YOUR_STEPS[table], dtype=torch.float64)).double().log()
    position = torch.linspace(0, len(listed) - 1, steps + 1, dtype=torch.float64)
    low = position.floor().long().clamp(max=len(listed) - 2)
    sigmas = torch.lerp(listed[low], listed[low + 1], position - low).exp()
    return with_zero(sigmas[:-1].float())


def table_of(levels: Levels) -> Tensor:
    """Return all levels the model can tell apart, ascending float64: its training table, or 1000 fractions of a flow."""
    if isinstance(levels, DiscreteLevels):
        return levels.sigmas
    last, first = (round(t) for t in _last_and_first(levels))
    return levels.t_to_sigma(torch.arange(first, last + 1, dtype=torch.float64)).double()


def beta(levels: Levels, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Timesteps at the quantiles of a beta distribution, denser at both ends (arXiv 2407.12173); repeated ones are left out."""
    last, first = (round(t) for t in _last_and_first(levels))
    quantiles = beta_quantiles(1 - torch.arange(steps, dtype=torch.float64) / steps, alpha, beta)
    return from_timesteps(levels, sorted({max(round(float(q) * last), first) for q in quantiles}, reverse=True))


def beta_quantiles(probabilities: Tensor, alpha: float, beta: float, cells: int = 1 << 16) -> Tensor:
    """Return the quantiles of Beta(alpha, beta) for probabilities (N,), to about 1e-5 and without scipy.

    With t = sin(u)^2 the density 2 sin(u)^(2 alpha - 1) cos(u)^(2 beta - 1) is bounded for exponents of 1/2 and more.
    """
    edges = torch.linspace(0, math.pi / 2, cells + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = middles.sin() ** (2 * alpha - 1) * middles.cos() ** (2 * beta - 1)
    cumulative = torch.cat([mass.new_zeros(1), mass.cumsum(0)]) / mass.sum()
    high = torch.searchsorted(cumulative, probabilities).clamp(1, cells)
    share = (probabilities - cumulative[high - 1]) / (cumulative[high] - cumulative[high - 1]).clamp(min=1e-30)
    return torch.lerp(edges[high - 1], edges[high], share.clamp(0, 1)).sin() ** 2


SCHEDULES: dict[str, Callable[[Levels, int], Tensor]] = {
    "uniform": uniform,
    "leading": leading,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "kl_optimal": kl_optimal,
}


def whole_steps(steps: int, strength: float) -> int:
    """Return of how many steps `steps` are the last, for image to image at `strength`: int(steps / strength), as the host does.

    Raises ValueError when that is finer than the training levels.
    """
    check_integer("steps", steps, 1, TRAIN_STEPS)
    check_range("strength", strength, 1 / TRAIN_STEPS, 1)
    total = int(steps / strength)
    if total > TRAIN_STEPS:
        remedy = f"Use at most {int(TRAIN_STEPS * strength)} steps at this strength."
        check_range("strength", strength, steps / TRAIN_STEPS, 1, remedy)
    return total


def make_sigmas(name: str, levels: Levels, steps: int, strength: float = 1.0) -> Tensor:
    """Return `steps` descending sigmas plus the terminal 0 from a named schedule.

    `strength` below 1 keeps the last `steps` levels of a finer schedule, see `whole_steps`.
    """
    check_choice("schedule", name, SCHEDULES)
    return SCHEDULES[name](levels, whole_steps(steps, strength))[-(steps + 1) :]
