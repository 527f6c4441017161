"""Anchors of residual guidance over the parts of one sampling (SplitSigmas, leftover noise).

A part that ends with noise left hands on its latents and nothing else. So the anchor of each image is kept under the content of
its noisy latents, and the part that begins with them finds it, whatever nodes lie between. What the anchor was asked of (`asked`:
the MODEL and the negative prompt of `onetime`) is part of its name: a part with another one does not take it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...core.cache import INVERSIONS
from ...core.identity import Identity, identify


def keep(kind: str, asked: Identity | None, latents: Tensor, anchors: Tensor) -> None:
    """Keep `anchors` (B, C, H, W) of a part that ended with `latents` (B, C, H, W) under guidance `kind`."""
    for key, anchor in zip(_keys(kind, asked, latents), anchors.detach().to("cpu", copy=True).split(1)):
        INVERSIONS.get(key, partial(torch.clone, anchor))


def find(kind: str, asked: Identity | None, latents: Tensor) -> Tensor | None:
    """Return the anchors (B, C, H, W) of the part before, where that of every image is known."""
    nothing = torch.empty(0)  # stands for an anchor that leaves the cache between these two lines
    found = [INVERSIONS.get(key, nothing.clone) for key in _keys(kind, asked, latents) if key in INVERSIONS]
    complete = len(found) == len(latents) and all(len(anchor) for anchor in found)
    return torch.cat(found).to(latents) if complete else None


def _keys(kind: str, asked: Identity | None, latents: Tensor) -> list[Identity]:
    return [identify("rcfg anchor", kind, asked, row.detach().float().cpu()) for row in latents.split(1)]
