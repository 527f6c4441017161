"""Guidance: each formula once. All are affine in the denoised estimate, so they hold for eps, v, x0 and flow models alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from torch import Tensor

from .checks import check_choice, check_range
from .denoiser import Cond, Denoiser, NoiseSpace, per_row
from .transfer import to_device

# A model with its conditioning and guidance bound: (x (B, C, H, W), sigma (B,) or a single level) -> denoised.
Denoise = Callable[[Tensor, Tensor], Tensor]
# The kinds of guidance; "self" and "onetime" are residual.
GUIDANCE = ("none", "full", "self", "onetime")
# Below this share of signal in a noised latent of unit variance, "the latent divided by its signal" is taken for noise. The
# noisiest level of SD1.5 and SDXL holds 0.068; the first levels of zero-terminal-SNR and flow models hold less.
MIN_SIGNAL = 0.0625


def cfg(uncond: Tensor, cond: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Return uncond + cfg_scale * (cond - uncond): classifier-free guidance in x0 form (arXiv 2207.12598 eq. 6)."""
    return uncond + cfg_scale * (cond - uncond)


class Guided(Protocol):
    """Ability of a model that combines estimates itself, because patches act around its network (a host's RescaleCFG, PAG)."""

    def guided(
        self, x: Tensor, sigma: Tensor, cond: Any, uncond: Any, cfg_scale: float, negative: Tensor | None = None
    ) -> Tensor:
        """Return the guided estimate of `x` (B, C, H, W) at `sigma` (B,); `negative` takes the place of `uncond`'s estimate."""
        ...


def own_guidance(model: Any) -> Callable[..., Tensor] | None:
    """Return the model's own `guided` (see `Guided`), None where plain arithmetic gives the same."""
    own: Callable[..., Tensor] | None = getattr(model, "guided", None)
    return own


def denoise_many(model: Denoiser[Cond], x: Tensor, sigma: Tensor, conds: Sequence[Cond]) -> list[Tensor]:
    """Denoise the same `x` (B, C, H, W) under several conditionings in ONE network call of len(conds) * B rows."""
    rows = len(x)
    sigma = per_row(sigma, x).flatten().expand(rows)
    batch = [cond.expand(rows) for cond in conds]
    if len(batch) == 1:
        return [model(x, sigma, batch[0])]
    joined = model(torch.cat([x] * len(batch)), sigma.repeat(len(batch)), batch[0].join(*batch[1:]))
    return list(joined.chunk(len(batch)))


def guided(
    model: Denoiser[Cond], x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond | None = None,
    cfg_scale: float = 1.0, negative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Denoise `x` (B, C, H, W) under classifier-free guidance, in one network call.

    Costs 2B rows; B at scale 1, without `uncond`, or with a `negative` estimate that takes the place of `uncond`'s.
    """
    own = own_guidance(model)
    if own is not None:
        return own(x, sigma, cond, uncond, cfg_scale, negative)
    if cfg_scale == 1 or (uncond is None and negative is None):
        return denoise_many(model, x, sigma, [cond])[0]
    if negative is None:
        assert uncond is not None
        negative, positive = denoise_many(model, x, sigma, [uncond, cond])
    else:
        positive = denoise_many(model, x, sigma, [cond])[0]
    return cfg(negative, positive, cfg_scale)


@dataclass(frozen=True)
class CFG(Generic[Cond]):
    """Classifier-free guidance bound to a model: a `Denoise` callable of 2B rows, or B when it has no effect.

    `cfg_scale` 1 or `uncond` None costs one row per sample.
    """

    model: Denoiser[Cond]
    cond: Cond
    uncond: Cond | None = None
    cfg_scale: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return guided(self.model, x, sigma, self.cond, self.uncond, self.cfg_scale)


# -- residual guidance


def residual_weights(sigma: Tensor, delta: float, space: NoiseSpace) -> tuple[Tensor, Tensor] | None:
    """Return (weight of the reference, weight of x), shaped like `sigma`, of the residual negative; None where it is the reference.

    Where the latent holds no signal (zero terminal SNR, a flow at sigma 1) there is nothing to move towards: delta counts as 1.
    """
    if delta == 1:
        return None
    scale = space.scale(sigma)
    signal = scale if space.name == "flow" else (sigma**2 + 1).rsqrt()
    kept = torch.where(signal < MIN_SIGNAL, 1.0, delta)
    return kept, (1 - kept) / scale.clamp(min=MIN_SIGNAL)


def residual_negative(x: Tensor, reference: Tensor, weights: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return reference + (1 - delta) * (x / scale - reference): the negative estimate of residual guidance.

    StreamDiffusion (arXiv 2312.12491 section 3.2) guides by eps_c + (cfg_scale - 1) * (eps_c - delta * eps_v), where eps_v =
    (x - scale * reference) / sigma is the noise that would lead from `reference` to `x`. Written as denoised estimates, the
    noise drops out, which is this rule; it holds for VE and FLOW. `weights` come from `residual_weights`, as (B, 1, 1, 1).
    """
    if weights is None:
        return reference
    kept, noised = weights
    return torch.addcmul(noised * x, kept, reference.to(kept.dtype)).to(x.dtype)


@dataclass
class RCFG(Generic[Cond]):
    """Residual CFG as a guided model for any sampler: (x (B, C, H, W), sigma) -> denoised. Good for one run.

    Args:
        model: the `Denoiser`.
        cond, uncond: prompt and negative prompt, 1 or B rows.
        guidance: "none" and "self" cost B rows a call, "onetime" 2B at the first call and B after it, "full" 2B.
        cfg_scale: 1 (off) or more.
        delta: between 0 and 1; how far the residual negative is trusted. Without effect where `x` holds no signal.
        reference: (B, C, H, W) the clean latents that "self" takes as the negative. "onetime" keeps the negative prompt's
            estimate here; given one (of an earlier part of the same sampling), it asks no negative prompt.
    """

    model: Denoiser[Cond]
    cond: Cond
    uncond: Cond | None
    guidance: str = "self"
    cfg_scale: float = 1.2
    delta: float = 1.0
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        check_choice("guidance", self.guidance, GUIDANCE)
        check_range("cfg_scale", self.cfg_scale, 1, 100, "1 switches guidance off.")
        check_range("delta", self.delta, 0, 1)
        if self.guidance == "self" and self.reference is None and self.cfg_scale > 1:
            raise ValueError("Expected `reference` latents for guidance 'self', but got None. Use 'onetime'.")
        if self.guidance in ("full", "onetime") and self.uncond is None and self.cfg_scale > 1:
            raise ValueError(f"Expected `uncond` for guidance {self.guidance!r}, but got None. Give a negative prompt.")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.guidance not in ("self", "onetime") or self.cfg_scale == 1:
            cfg_scale = 1.0 if self.guidance == "none" else self.cfg_scale
            return guided(self.model, x, sigma, self.cond, self.uncond, cfg_scale)
        if self.reference is not None:
            negative = self._negative(x, sigma, self.reference)
            return guided(self.model, x, sigma, self.cond, self.uncond, self.cfg_scale, negative)
        assert self.uncond is not None
        if own_guidance(self.model) is not None:
            self.reference = denoise_many(self.model, x, sigma, [self.uncond])[0]
            return self(x, sigma)
        self.reference, positive = denoise_many(self.model, x, sigma, [self.uncond, self.cond])
        return cfg(self._negative(x, sigma, self.reference), positive, self.cfg_scale)

    def _negative(self, x: Tensor, sigma: Tensor, reference: Tensor) -> Tensor:
        weights = residual_weights(per_row(sigma, x), self.delta, self.model.space)
        return residual_negative(x, to_device(reference, x.device), weights)
