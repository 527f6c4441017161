"""Ways to combine estimates. All are affine in the denoised estimate, so they hold for eps, v, x0 and flow models alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor

from .denoiser import Cond, Denoiser, per_row

# A model with its conditioning and guidance bound: (x (B, C, H, W), sigma (B,) or a single level) -> denoised.
Denoise = Callable[[Tensor, Tensor], Tensor]


def cfg(uncond: Tensor, cond: Tensor, cfg_scale: float | Tensor) -> Tensor:
    """Return uncond + cfg_scale * (cond - uncond): classifier-free guidance in x0 form (arXiv 2207.12598 eq. 6)."""
    return uncond + cfg_scale * (cond - uncond)


def denoise_many(model: Denoiser[Cond], x: Tensor, sigma: Tensor, conds: Sequence[Cond]) -> list[Tensor]:
    """Denoise the same `x` (B, C, H, W) under several conditionings in ONE network call of len(conds) * B rows."""
    rows = len(x)
    sigma = per_row(sigma, x).flatten().expand(rows)
    batch = [cond.expand(rows) for cond in conds]
    if len(batch) == 1:
        return [model(x, sigma, batch[0])]
    joined = model(torch.cat([x] * len(batch)), sigma.repeat(len(batch)), batch[0].join(*batch[1:]))
    return list(joined.chunk(len(batch)))


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
        if self.uncond is None or self.cfg_scale == 1:
            return denoise_many(self.model, x, sigma, [self.cond])[0]
        negative, positive = denoise_many(self.model, x, sigma, [self.uncond, self.cond])
        return cfg(negative, positive, self.cfg_scale)
