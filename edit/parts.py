"""What each task asks of the latents: energies and regions. All weights are shares of latent cells, (1, 1, h, w)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import EditConfig
from .geometry import Canvas, Placement, Point, sample_at
from .placing import affine_of
from .tasks import Appearance, Drag, Move, Paste, Remove, Task

Features = list[Tensor]
KeyValue = tuple[Tensor, Tensor]
# From this similarity on the angle between features is below 2 sqrt(1e-5), 0.6 percent: they are the same but for rounding.
SAME = 1 - 1e-5


@dataclass(frozen=True)
class Energy:
    """One energy (a scalar tensor) and the region (1, 1, h, w) of the latents that its gradient may move."""

    value: Tensor
    region: Tensor


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return (cos + 1) / 2 over channels, in [0, 1]: (1, h, w) from maps (1, C, h, w). What is the same has no gradient."""
    close = (F.cosine_similarity(a.float(), b.float(), dim=1) + 1) / 2
    # Else rounding would guide: guidance has one strength, however small the gradient is.
    return torch.where(close > SAME, close.detach(), close)


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of (1, h, w) values under weights (1, 1, h, w); an empty region gives 0."""
    return (values * weights[:, 0]).sum() / weights.sum().clamp(min=1e-6)


def pooled(maps: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean vector (1, C, 1, 1) of maps (1, C, h, w)."""
    return (maps.float() * weights).sum((2, 3), keepdim=True) / weights.sum().clamp(min=1e-6)


def inverse(weight: float, closeness: Tensor) -> Tensor:
    """Return weight / (1 + 4 S); S in [0, 1], so that there is no pole (raw cosines have one at -1/4)."""
    return weight / (1 + 4 * closeness)


def on_cells(maps: Tensor, canvas: Canvas, points: Tensor | None = None) -> Tensor:
    """Return maps of any size over a canvas, read at pixel coordinates (h, w, 2) (the centres of its own cells when None)."""
    points = canvas.cell_centres() if points is None else points
    at = canvas.normalised(points)[None].to(maps)
    return F.grid_sample(maps, at, "bilinear", "border", align_corners=False)


@dataclass(frozen=True)
class Part:
    """One task on the latent grid.

    `target` is where new content appears, `removed` what is taken away and `vacated` what of that stays uncovered; `source_of` is
    the index of the photo it takes content from (0 is the edited one) and `source` (1, 1, hs, ws) its region there; `points`
    (h, w, 2) are the pixel coordinates there that each cell comes from, None where nothing is carried.
    """

    target: Tensor
    removed: Tensor
    vacated: Tensor
    source_of: int
    source: Tensor
    points: Tensor | None
    fill_from: Tensor | None = None
    bends: bool = False
    # A drag by energy changes what lies in `free` and pulls at `handles` (P, 3, 3, 2) -> `targets` (P, 3, 3, 2), pixels.
    handles: Tensor | None = None
    targets: Tensor | None = None

    @property
    def carries(self) -> bool:
        """Whether it carries content cell by cell, so that the moved inversion can be followed."""
        return self.points is not None

    def edit_energy(
        self, current: Features, base: Features, own: Features, canvases: Sequence[Canvas], config: EditConfig
    ) -> Energy:
        """Return what draws the target to its source (`own` are the features of the photo it takes from)."""
        if self.handles is not None:
            return Energy(self._point_energy(current, base, canvases[0], config), self.target)
        energy = current[0].new_zeros((), dtype=torch.float32)
        for f, q in zip(current, own):
            ours = on_cells(f, canvases[0])
            if self.points is None:
                theirs = pooled(on_cells(q, canvases[self.source_of]), self.source)
                close = similarity(pooled(ours, self.target), theirs).mean()
            else:
                close = weighted(similarity(ours, on_cells(q, canvases[self.source_of], self.points)), self.target)
            energy = energy + inverse(config.w_edit, close) / len(current)
        return Energy(energy, self.target)

    def fill_energy(
        self, current: Features, base: Features, kept: Tensor, canvas: Canvas, config: EditConfig
    ) -> Tensor:
        """Return what makes the vacated area unlike the object that left and like what surrounds it; 0 when nothing is vacated."""
        energy = current[0].new_zeros((), dtype=torch.float32)
        if float(self.vacated.sum()) < 0.5:
            return energy
        source = kept if self.fill_from is None else self.fill_from
        for f, r in zip(current, base):
            ours, theirs = on_cells(f, canvas), on_cells(r, canvas)
            energy = energy + config.w_contrast * weighted(similarity(ours, theirs), self.vacated) / len(current)
            close = similarity(pooled(ours, self.vacated), pooled(theirs, source)).mean()
            energy = energy + inverse(config.w_inpaint, close) / len(current)
        return energy

    def _point_energy(self, current: Features, base: Features, canvas: Canvas, config: EditConfig) -> Tensor:
        assert self.handles is not None
        assert self.targets is not None
        energy = current[0].new_zeros((), dtype=torch.float32)
        for f, r in zip(current, base):
            for handle, target in zip(self.handles, self.targets):
                close = similarity(on_cells(f, canvas, target), on_cells(r, canvas, handle)).mean()
                left = similarity(on_cells(f, canvas, handle), on_cells(r, canvas, handle)).mean()
                energy = energy + inverse(config.w_edit, close) + config.w_inpaint * left
        return energy / (len(current) * len(self.handles))


def make_part(task: Task, placed: Placement, canvases: Sequence[Canvas], source_of: int) -> Part:
    """Return a placed task on the latent grid; `source_of` is the index of the photo it takes from."""
    base, own = canvases[0], canvases[source_of]
    target, removed, vacated = (base.to_grid(m) for m in (placed.target, placed.removed, placed.vacated))
    if isinstance(task, Appearance):
        return Part(target, removed, vacated, source_of, own.to_grid(task.reference_mask), None)
    if isinstance(task, Remove):
        return Part(target, removed, vacated, 0, removed, base.cell_centres())
    assert isinstance(task, (Move, Paste, Drag))
    if isinstance(task, Drag) and not placed.carries:
        handles, targets = (torch.stack([_block(p[side], base.cell) for p in task.points]) for side in (0, 1))
        return Part(target, removed, vacated, 0, target, None, handles=handles, targets=targets)
    # One cell reads its content at its centre, sub-pixel; its weight is the share of its pixels that the object covers.
    if isinstance(task, Drag):
        origins = sample_at(rearrange(placed.points, "h w xy -> 1 xy h w"), base.cell_centres(), base.size)
        points = rearrange(origins, "1 xy h w -> h w xy")
    else:
        points = affine_of(task).inverse(base.cell_centres())
    fill = base.to_grid(task.fill_from) if isinstance(task, Move) and task.fill_from is not None else None
    return Part(target, removed, vacated, source_of, own.to_grid(task.mask), points, fill, placed.bends)


def _block(point: Point, cell: float) -> Tensor:
    """Return 3 x 3 points (3, 3, 2) half a cell apart around a point."""
    offsets = torch.tensor([-0.5, 0.0, 0.5]) * cell
    ys, xs = torch.meshgrid(offsets + point[1], offsets + point[0], indexing="ij")
    return torch.stack([xs, ys], -1)
