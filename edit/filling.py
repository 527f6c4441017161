"""What an object leaves behind, filled from its surroundings: a shifted copy of the image that fits around the hole, or many small ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.masks import bounding_box, grow, touched
from ..core.tensors import fill
from .completion import completed

# Shifts are looked for on an image of this many cells a side, the best of them then pixel by pixel.
COARSE = 64
CANDIDATES = 12
# Pixels that a shift is judged by, as many around the hole and as many within: at first sight, and at last.
GLANCE, SAMPLES = 64, 384
# Values differ where they do so by more than this share of the image's deviation.
TOLERANCE = 0.1
# A copy is taken where at most this share of its surroundings differs, a plain one up to the second: what differs there are other
# objects. Where no more than the third differs, or the copy is plain, the network need not repaint it.
MOST, MOST_PLAIN, SURE = 0.25, 0.6, 0.1
# What one copy cannot reach, beyond the image's edge or another object, is left to the next.
ROUNDS = 3


def refilled(values: Tensor, gone: Sequence[Tensor], carried: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return values (1, C, H, W) with the regions `gone` (H, W) filled from around them, and where (H, W) that is sure to be right.

    Each region is filled by the copy of the image, shifted by whole pixels, that fits best around it (as in shift-map editing,
    Pritch et al., ICCV 2009, with one shift at a time), plus the smooth continuation of what differs around it: patterns continue,
    and so do gradients. What no copy fits is `completed` from small patches.
    """
    sure = torch.zeros(values.shape[-2:], device=values.device)
    regions = [g for g in gone if bool(touched(g).any())]
    if not regions:
        return values, sure
    # Half-covered border pixels of an object would bleed its colour into the fill: leave out one more.
    holes = [_dilated(touched(g.to(values.device)), 1) for g in regions]
    unknown = torch.stack(holes).any(0)
    out, left = values, unknown
    for hole in holes:
        for _ in range(ROUNDS):
            hole = hole & left
            if not bool(hole.any()):
                break
            copy = _best_copy(values, out, hole, unknown, left)
            if copy is None:
                break
            out, left = torch.where(copy.region, copy.values, out), left & ~copy.region
            sure = torch.where(copy.region, float(copy.sure), sure)
    usable = ~unknown if carried is None else ~unknown & ~touched(carried.to(values.device))
    return completed(out, left, usable) if bool(left.any()) else out, sure


@dataclass(frozen=True)
class _Copy:
    """What fills `region` (H, W), and whether that is sure to be right."""

    values: Tensor
    region: Tensor
    sure: bool


def _best_copy(values: Tensor, out: Tensor, hole: Tensor, unknown: Tensor, left: Tensor) -> _Copy | None:
    """Return the best shifted copy for a hole (H, W): from what is not `unknown`, to fit what is not `left`; None where none fits."""
    height, width = hole.shape
    step = max(1, -(-max(height, width) // COARSE))
    tolerance = TOLERANCE * float(values[..., ~unknown].std())
    if tolerance == 0:
        tolerance = 1.0
    coarse = _Sample.of(
        _reduced(values, unknown, step), _reduced(out, left, step), _pooled(hole, step), _pooled(unknown, step), _pooled(left, step),
        2, tolerance,
    )  # fmt: skip
    if coarse is None:
        return None
    coarse = coarse.wary()
    best = coarse.best(_all_shifts(coarse.size, hole.device), CANDIDATES, GLANCE) * step
    fine = _Sample.of(values, out, hole, unknown, left, max(2, step // 2), tolerance)
    if fine is None:
        return None
    fine = replace(fine, strange=coarse.strange, step=step)
    if step > 1:
        best = (best[:, None] + _square(step, hole.device)[None]).reshape(-1, 2).unique(dim=0)
    best = fine.best(fine.best(best, CANDIDATES, GLANCE), 1)
    misfit, (dy, dx) = float(fine.costs(best)[0, 0]), best[0].tolist()
    return None if misfit > MOST_PLAIN else _copied(values, out, hole, unknown, left, (dy, dx), misfit, tolerance)


def _copied(
    values: Tensor, out: Tensor, hole: Tensor, unknown: Tensor, left: Tensor, shift: tuple[int, int], misfit: float, tolerance: float
) -> _Copy | None:  # fmt: skip
    source = _shifted(~unknown, shift)
    region = hole & source
    if not bool(region.any()):
        return None
    copy = _shifted(values, shift)
    low, high = copy[0][:, region].aminmax(dim=1)
    plain = float((high - low).max()) <= tolerance
    if misfit > MOST and not plain:
        return None
    difference = out - copy
    fits = _dilated(hole, 4) & ~left & source & (difference.abs().amax((0, 1)) <= tolerance)
    if bool((difference[..., fits].abs() > 1 / 512).any()):
        # What differs around the hole, its light say, continues smoothly within.
        top, left_, bottom, right = bounding_box(_dilated(hole, 8))
        part = (..., slice(top, bottom), slice(left_, right))
        copy = copy.clone()
        copy[part] += fill(difference[part], fits[part].to(values)[None, None])
    return _Copy(copy, region, plain or misfit <= SURE)


@dataclass(frozen=True)
class _Sample:
    """Pixels around a hole and within it, to judge shifts by: `ring` and `inside` (N, 2) as (y, x).

    `strange` (h, w) says of cells of `step` pixels how little they look like anything around the hole.
    """

    values: Tensor
    valid: Tensor
    ring: Tensor
    wanted: Tensor
    inside: Tensor
    tolerance: float
    strange: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    step: int = 1

    @classmethod
    def of(
        cls, values: Tensor, out: Tensor, hole: Tensor, unknown: Tensor, left: Tensor, reach: int, tolerance: float
    ) -> _Sample | None:
        ring, inside = _picked(_dilated(hole, reach) & ~left), _picked(hole)
        if not len(ring) or not len(inside):
            return None
        image = rearrange(values[0], "c h w -> h w c")
        wanted = rearrange(out[0], "c h w -> h w c")[ring[:, 0], ring[:, 1]]
        return cls(image, ~unknown, ring, wanted, inside, tolerance)

    def wary(self) -> _Sample:
        """Return it with `strange`: what a copy brings must look like something around the hole, else it would be another object."""
        away = torch.cdist(self.values, self.wanted.expand(len(self.values), -1, -1)).amin(-1)
        return replace(self, strange=(away / (2 * self.tolerance)).square().clamp(max=1))

    @property
    def size(self) -> tuple[int, int]:
        return self.valid.shape[0], self.valid.shape[1]

    def best(self, shifts: Tensor, count: int, samples: int = SAMPLES) -> Tensor:
        """Return the `count` best of shifts (S, 2), the shorter of two that are as good."""
        costs = self.costs(shifts, samples).sum(0) + 1e-3 * (shifts / max(self.size)).norm(dim=-1)
        return shifts[costs.topk(min(count, len(costs)), largest=False).indices]

    def costs(self, shifts: Tensor, samples: int = SAMPLES) -> Tensor:
        """Return for shifts (S, 2) the shares (2, S) of what differs around the hole, and of what is strange or unknown within."""
        around, within = [], []
        ring, inside = (
            torch.linspace(0, len(p) - 1, min(len(p), samples)).round().long() for p in (self.ring, self.inside)
        )
        for part in shifts.split(4096):
            ys, xs, there = self._at(self.ring[ring], part)
            apart = (self.values[ys, xs] - self.wanted[ring]).square().amax(-1) / self.tolerance**2
            around.append(torch.where(there, apart.clamp(max=1), 1.0).mean(1))
            ys, xs, there = self._at(self.inside[inside], part)
            within.append(torch.where(there, self.strange[ys // self.step, xs // self.step], 1.0).mean(1))
        return torch.stack([torch.cat(around), torch.cat(within)])

    def _at(self, points: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = self.size
        ys, xs = (points[None] + shifts[:, None]).unbind(-1)
        inside = (ys >= 0) & (ys < height) & (xs >= 0) & (xs < width)
        ys, xs = ys.clamp(0, height - 1), xs.clamp(0, width - 1)
        return ys, xs, inside & self.valid[ys, xs]


def _picked(mask: Tensor, most: int = SAMPLES) -> Tensor:
    """Return at most so many points (N, 2) of a mask, evenly spread in raster order."""
    points = mask.nonzero()
    picks = torch.linspace(0, len(points) - 1, min(len(points), most), device=mask.device).round().long()
    return points[picks]


def _all_shifts(size: tuple[int, int], device: torch.device) -> Tensor:
    height, width = size
    ys, xs = torch.arange(1 - height, height, device=device), torch.arange(1 - width, width, device=device)
    return torch.cartesian_prod(ys, xs)


def _square(reach: int, device: torch.device) -> Tensor:
    along = torch.arange(-reach, reach + 1, device=device)
    return torch.cartesian_prod(along, along)


def _shifted(values: Tensor, shift: tuple[int, int]) -> Tensor:
    """Return values (..., H, W) read at p + shift; what lies outside is 0."""
    out = torch.zeros_like(values)
    (dy, dx), (height, width) = shift, values.shape[-2:]
    to_rows, to_columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    from_rows, from_columns = slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx))
    out[..., to_rows, to_columns] = values[..., from_rows, from_columns]
    return out


def _dilated(mask: Tensor, reach: int) -> Tensor:
    """Return a mask (H, W) with something in it, grown by a square of that radius."""
    top, left, bottom, right = bounding_box(mask)
    part = (slice(max(0, top - reach), bottom + reach), slice(max(0, left - reach), right + reach))
    grown = torch.zeros_like(mask)
    grown[part] = grow(mask[part], reach)
    return grown


def _pooled(mask: Tensor, step: int) -> Tensor:
    """Return where cells of `step` pixels touch a mask (H, W)."""
    return F.max_pool2d(mask.float()[None, None], step, step, ceil_mode=True)[0, 0] > 0.5


def _reduced(values: Tensor, unknown: Tensor, step: int) -> Tensor:
    """Return the mean of what is known of each cell of `step` pixels."""
    if step == 1:
        return values
    weight = (~unknown).to(values)[None, None]
    total = F.avg_pool2d(values * weight, step, step, ceil_mode=True)
    return total / F.avg_pool2d(weight, step, step, ceil_mode=True).clamp(min=1e-6)
