"""The published code's behaviour, for comparison only: its masks, energies, start latents and attention, rounding and slips included.

Sources: DragonDiffusion (arXiv 2307.02421), DiffEditor (arXiv 2402.02583). What is known to be wrong in it stays wrong here and
is named where it happens; the default mode (`guided.py`) has none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.attention import Attend, token_grid
from ..core.features import FeatureModel
from ..core.noise import NoiseSource
from .config import EditConfig
from .invert import Inversion
from .picture import EditResult
from .problem import KeyValue, Pull
from .tasks import Appearance, Drag, Landmarks, Move, Paste, Point, Task

Masks = dict[str, Tensor]
CELL = 4  # image pixels of a feature pixel: maps are blown up to twice the latents' size
LATENT = 8  # image pixels of a latent cell: the published code knows factor 8 only


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, H, W) by nearest neighbour."""
    return F.interpolate(x.float(), tuple(size), mode="nearest")


def binary(mask: Tensor) -> Tensor:
    """Return a pixel mask (..., H, W) as (1, 1, H, W) of zeros and ones."""
    return (mask.reshape(1, 1, *mask.shape[-2:]) > 0.5).float()


# --- masks (1.4) ---


def _placed(mask: Tensor, dx: float, dy: float, scale: float, cell: int) -> tuple[Tensor, Tensor]:
    """Return a pixel mask scaled about the picture's centre at its own scaled grid, and rolled onto the grid of the picture."""
    height, width = mask.shape[-2] // cell, mask.shape[-1] // cell
    target = nearest(mask, (int(height * scale), int(width * scale))) > 0.5
    rolled = torch.roll(target, (int(dy // cell * scale), int(dx // cell * scale)), (-2, -1))
    return target, centred(rolled, height, width)


def centred(x: Tensor, height: int, width: int) -> Tensor:
    """Crop or zero-pad (1, C, H, W) about its centre to `height` x `width`; raises ValueError when a crop loses a mask's pixels."""
    h, w = x.shape[-2:]
    if h >= height:
        top, left = (h - height) // 2, (w - width) // 2
        out = x[..., top : top + height, left : left + width]
        if x.dtype == torch.bool and out.sum() != x.sum():
            raise ValueError(
                "Expected the scaled object within the picture, but got one that leaves it. Scale it less."
            )
        return out
    top, left = (height - h) // 2, (width - w) // 2
    return F.pad(x, (left, width - w - left, top, height - h - top))


def move_masks(mask: Tensor, dx: float, dy: float, scale: float, input_scale: float = 1.0) -> Masks:
    """Return the masks of a move at feature size; shifts in picture pixels."""
    mask = binary(mask)
    org = nearest(mask, (mask.shape[-2] // CELL, mask.shape[-1] // CELL)) > 0.5
    target, current = _placed(mask, dx * input_scale, dy * input_scale, scale, CELL)
    return {
        "tar": target, "cur": current, "other": ~(current | org), "overlap": current & org, "non_overlap": org & ~current,
    }  # fmt: skip


def drag_masks(mask: Tensor, points: Sequence[tuple[Point, Point]]) -> Masks:
    """Return the 3 x 3 blocks of every handle and target (P, h, w) at feature size, and what lies outside `mask`.

    x is clipped with the height, as published: wrong on landscape pictures.
    """
    mask = binary(mask)
    height, width = mask.shape[-2] // CELL, mask.shape[-1] // CELL
    return {**point_masks(points, height, width, height), "other": nearest(mask, (height, width)) < 0.5}


def point_masks(points: Sequence[tuple[Point, Point]], height: int, width: int, columns: int) -> Masks:
    """Return the 3 x 3 blocks (P, height, width) of every handle and target, x clipped to `columns`."""
    blocks = [[_block(p, height, width, columns) for p in pair] for pair in points]
    return {name: torch.cat([pair[side] for pair in blocks]) for side, name in enumerate(("tar", "cur"))}


def _corner(point: tuple[float, float], height: int, columns: int) -> tuple[int, int]:
    x, y = (int(v // CELL) for v in point)
    return min(max(y, 1), height - 2), min(max(x, 1), columns - 2)


def _block(point: tuple[float, float], height: int, width: int, columns: int) -> Tensor:
    y, x = _corner(point, height, columns)
    out = torch.zeros(1, height, width, dtype=torch.bool)
    out[:, y - 1 : y + 2, x - 1 : x + 2] = True
    return out


def paste_masks(mask: Tensor, dx: float, dy: float, scale: float) -> Masks:
    """Return the target region of a paste and, cell for cell, the region of the reference; "_pixels" at picture size."""
    mask = binary(mask)
    height, width = mask.shape[-2:]
    scaled = nearest(mask, (int(height * scale), int(width * scale))) > 0.5
    reference = centred(scaled, height, width)
    base = torch.roll(reference, (int(dy), int(dx)), (-2, -1))
    current = nearest(base, (height // CELL, width // CELL)) > 0.5
    # Truncation here, floor in `_placed`: negative shifts differ by one cell, as published.
    back = (-int(dy / CELL), -int(dx / CELL))
    return {
        "base": current, "replace": torch.roll(current, back, (-2, -1)), "base_pixels": base, "replace_pixels": reference,
    }  # fmt: skip


# --- energies (1.5) ---
# Features: lists of maps (1, C, 2h, 2w), F the current ones, R the base picture's, Q the reference picture's.


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine over channels of (1, C, N) and (1, C, N)."""
    return F.cosine_similarity(a, b, dim=1)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Return (cos + 1) / 2."""
    return (cosine(a, b) + 1) / 2


def at(features: Tensor, mask: Tensor) -> Tensor:
    """Return the columns (1, C, N) of a map (1, C, H, W) under a mask (..., H, W) in raster order."""
    return features[:, :, mask.reshape(mask.shape[-2:])]


def centre(columns: Tensor) -> Tensor:
    return columns.mean(-1, keepdim=True)


def inverse(weight: float, closeness: Tensor) -> Tensor:
    """Return weight / (1 + 4 S), the method's basic term."""
    return weight / (1 + 4 * closeness)


def move_energy(
    current: list[Tensor],
    base: list[Tensor],
    masks: Masks,
    scale: float,
    weights: EditConfig,
    inpaint_from: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (edit, content) of a move; raw cosines, and no vacated-area terms when nothing is vacated."""
    edit = content = current[0].new_zeros(())
    tar, cur, other, vacated = (masks[k] for k in ("tar", "cur", "other", "non_overlap"))
    for f, r in zip(current, base):
        scaled = nearest(r, (int(r.shape[-2] * scale), int(r.shape[-1] * scale)))
        edit = edit + 0.5 * inverse(weights.w_edit, cosine(at(f, cur), at(scaled, tar)).mean())
        content = content + 0.5 * inverse(weights.w_content, cosine(at(f, other), at(r, other)).mean())
        if vacated.any():
            content = content + 0.5 * weights.w_contrast * similarity(at(f, vacated), at(r, vacated)).mean()
            source = at(r, other if inpaint_from is None else inpaint_from)
            content = content + inverse(weights.w_inpaint, similarity(centre(at(f, vacated)), centre(source)).mean())
    return edit, content


def drag_energy(current: list[Tensor], base: list[Tensor], masks: Masks, weights: EditConfig) -> tuple[Tensor, Tensor]:
    """Return (edit, content) of a drag."""
    edit = points_energy(current, base, masks, weights.w_edit, weights.w_inpaint)
    content = current[0].new_zeros(())
    for f, r in zip(current, base):
        content = content + 0.5 * inverse(
            weights.w_content, similarity(at(f, masks["other"]), at(r, masks["other"])).mean()
        )
    return edit, content


def points_energy(current: list[Tensor], base: list[Tensor], masks: Masks, w_edit: float, w_inpaint: float) -> Tensor:
    """Return the edit energy of point pairs; `w_inpaint` pushes a vacated handle away from its old content."""
    edit = current[0].new_zeros(())
    pairs = list(zip(masks["tar"], masks["cur"]))
    for f, r in zip(current, base):
        for tar, cur in pairs:
            edit = edit + inverse(w_edit, similarity(at(f, cur), at(r, tar)).mean())
            vacated = tar & ~cur
            if w_inpaint and vacated.any():
                edit = edit + w_inpaint * similarity(at(f, vacated), at(r, vacated)).mean()
    return edit / (2 * len(pairs))


def cross_energy(
    current: list[Tensor], base: list[Tensor], reference: list[Tensor], masks: Masks, weights: EditConfig, local: bool
) -> tuple[Tensor, Tensor]:
    """Return (edit, content) of a paste (`local`: cell for cell) or an appearance transfer (region means)."""
    edit = content = current[0].new_zeros(())
    region, source = masks["base"], masks["replace"]
    for f, r, q in zip(current, base, reference):
        ours, theirs = at(f, region), at(q, source)
        close = similarity(ours, theirs) if local else similarity(centre(ours), centre(theirs))
        edit = edit + inverse(weights.w_edit, close.mean())
        content = content + inverse(weights.w_content, similarity(at(f, ~region), at(r, ~region)).mean())
    return edit, content


# --- the edit (1.5 to 1.7) ---


class PublishedEdit:
    """One published edit of one picture; see `Problem`."""

    noise_strength: Tensor
    first_step = 0

    def __init__(self, task: Task, base: Inversion, config: EditConfig) -> None:
        self.base, self.config = base, config
        self.pictures: list[Inversion] = [base]
        self.notes: list[str] = []
        self.grid = (base.latents.shape[-2], base.latents.shape[-1])
        self.features_size = (2 * self.grid[0], 2 * self.grid[1])
        self.whole = torch.ones(1, 1, *self.grid)
        self.started = base.at(0).clone()
        self.slips_into_reference = False

    def start(self, noise: NoiseSource) -> Tensor:
        return self.started

    def reference(self, model: FeatureModel, step: int, index: int) -> list[Tensor]:
        picture = self.pictures[index]
        # Published drag edits the inverted noise in place, so that step 0 has no pull back to the picture.
        slipped = self.started if self.slips_into_reference and step == 0 else picture.at(step)
        # Every picture's features are taken under the base picture's prompt.
        return picture.features(model, step, slipped, self.base.cond)

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        raise NotImplementedError

    def pulls(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        blown_up = [[nearest(f, self.features_size) for f in maps] for maps in (current, *references)]
        return self.energies(blown_up[0], blown_up[1:])

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend
    ) -> Tensor:
        raise NotImplementedError

    factor = 0.04

    def scale(self, gradients: Sequence[Tensor], pulls: Sequence[Pull], eps: Tensor) -> Tensor:
        weight = self.factor * 1000 * self.config.energy_scale
        return sum((weight * g * p.region for g, p in zip(gradients, pulls)), torch.zeros_like(eps))

    def settle(self, step: int, x: Tensor) -> Tensor:
        return x

    def result(self, latents: Tensor, notes: tuple[str, ...]) -> EditResult:
        everywhere = torch.ones(1, *self.base.canvas.size)
        return EditResult(latents, everywhere, notes, None, None, everywhere)

    def to_grid(self, mask: Tensor) -> Tensor:
        """Return a mask (..., H, W) of any size at latent size."""
        return (nearest(mask.reshape(1, 1, *mask.shape[-2:]), self.grid) > 0.5).float()


class PublishedMove(PublishedEdit):
    factor = 0.08

    def __init__(self, task: Move, base: Inversion, config: EditConfig) -> None:
        super().__init__(task, base, config)
        self.task = task
        self.masks = move_masks(task.mask, task.dx, task.dy, task.scale)
        fill = task.fill_from
        self.inpaint_from = None if fill is None else nearest(binary(fill), self.features_size) > 0.5
        self.region = self.to_grid(self.masks["cur"])
        changed = nearest(binary(task.mask), self.features_size) > 0.5
        self.noise_strength = config.eta * self.to_grid(self.masks["cur"] | changed)
        self.started = self._start()

    def _start(self) -> Tensor:
        z, task = self.base.at(0), self.task
        size = (int(self.grid[0] * task.scale), int(self.grid[1] * task.scale))
        shift = (int(task.dy / LATENT * task.scale), int(task.dx / LATENT * task.scale))
        mask = torch.roll(nearest(binary(task.mask), size) > 0.5, shift, (-2, -1))
        moved = torch.roll(nearest(z, size), shift, (-2, -1))
        return torch.where(centred(mask, *self.grid), centred(moved, *self.grid), z)

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        edit, content = move_energy(current, references[0], self.masks, self.task.scale, self.config, self.inpaint_from)
        return [Pull(edit, self.region), Pull(content, 1 - self.region)]

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend
    ) -> Tensor:
        return attend(q, *(t.expand(len(q), -1, -1) for t in pictures[0]))


class PublishedPoints(PublishedEdit):
    """Drag and landmarks: the picture's keys and values are read beside the own ones."""

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend
    ) -> Tensor:
        own = zip((k, v), pictures[0])
        return attend(q, *(torch.cat([mine, kept.expand(len(q), -1, -1)], 1) for mine, kept in own))


class PublishedDrag(PublishedPoints):
    def __init__(self, task: Drag, base: Inversion, config: EditConfig) -> None:
        super().__init__(task, base, config)
        self.masks = drag_masks(task.mask, task.points)
        self.region = self.to_grid(binary(task.mask))
        self.noise_strength = config.eta * self.region
        self.slips_into_reference = True
        for handle, target in task.points:
            (y, x), (v, u) = (_corner(p, self.features_size[0], self.features_size[0]) for p in (handle, target))
            y, x, v, u = y // 2, x // 2, v // 2, u // 2
            if min(y, x, v, u) < 1:
                raise ValueError(
                    f"Expected points 8 pixels or more from the border (published mode), but got {handle}, {target}."
                )
            self.started[..., v - 1 : v + 2, u - 1 : u + 2] = self.started[..., y - 1 : y + 2, x - 1 : x + 2].clone()

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        edit, content = drag_energy(current, references[0], self.masks, self.config)
        return [Pull(edit, self.region), Pull(content, 1 - self.region)]


class PublishedLandmarks(PublishedPoints):
    def __init__(self, task: Landmarks, base: Inversion, config: EditConfig) -> None:
        super().__init__(task, base, config)
        height, width = self.features_size
        self.masks = point_masks(task.points, height, width, width)
        self.noise_strength = config.eta * self.whole

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        # The published slider for the push away is accepted and ignored.
        return [Pull(points_energy(current, references[0], self.masks, self.config.w_edit, 0.0), self.whole)]


class PublishedCross(PublishedEdit):
    """Appearance and paste: keys and values of the base outside the region and of the reference inside its own."""

    local = False

    def prepare(self, masks: Masks, reference: Inversion) -> None:
        self.masks = masks
        self.pictures.append(reference)
        self.region = self.to_grid(masks["base"])
        self.noise_strength = self.config.eta * self.region

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        edit, content = cross_energy(current, references[0], references[1], self.masks, self.config, self.local)
        return [Pull(edit, self.region), Pull(content, 1 - self.region)]

    def attend(
        self, step: int, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend
    ) -> Tensor:
        grid = token_grid(pictures[0][0].shape[1], *self.grid)
        outside = ~self._tokens("base_pixels", grid)
        inside = self._tokens("replace_pixels", grid)
        parts = zip(*pictures)
        return attend(q, *(torch.cat([b[:, outside], r[:, inside]], 1).expand(len(q), -1, -1) for b, r in parts))

    def _tokens(self, name: str, grid: tuple[int, int]) -> Tensor:
        return (nearest(self.masks[name], grid) > 0.5).flatten()


class PublishedAppearance(PublishedCross):
    def __init__(self, task: Appearance, base: Inversion, config: EditConfig) -> None:
        super().__init__(task, base, config)
        masks = {"base_pixels": binary(task.mask) > 0.5, "replace_pixels": binary(task.reference_mask) > 0.5}
        for name in ("base", "replace"):
            masks[name] = nearest(masks[name + "_pixels"], self.features_size) > 0.5
        self.prepare(masks, task.reference)


class PublishedPaste(PublishedCross):
    """The reference must be the inversion of the picture scaled about its centre by the task's scale (`scale_about_centre`)."""

    local = True

    def __init__(self, task: Paste, base: Inversion, config: EditConfig) -> None:
        super().__init__(task, base, config)
        self.prepare(paste_masks(task.mask, task.dx, task.dy, task.scale), task.reference)
        shift = (int(task.dy / LATENT), int(task.dx / LATENT))
        moved = torch.roll(task.reference.at(0), shift, (-2, -1))
        self.started = torch.where(self.region > 0, moved, base.at(0))


def scale_about_centre(pixels: Tensor, scale: float) -> Tensor:
    """Return pixels (1, C, H, W) scaled by nearest neighbour about the centre on a canvas of the same size, as the published paste does."""
    if scale == 1:
        return pixels
    height, width = pixels.shape[-2:]
    return centred(nearest(pixels, (int(height * scale), int(width * scale))), height, width)


EDITS: dict[type[Task], Callable[..., PublishedEdit]] = {
    Move: PublishedMove,
    Drag: PublishedDrag,
    Landmarks: PublishedLandmarks,
    Appearance: PublishedAppearance,
    Paste: PublishedPaste,
}


def published_edit(tasks: Sequence[Task], base: Inversion, config: EditConfig) -> PublishedEdit:
    """Return the published edit for exactly one task."""
    if len(tasks) != 1:
        raise ValueError(
            f"Expected one task in published mode, but got {len(tasks)}. Use the default mode for several."
        )
    return EDITS[type(tasks[0])](tasks[0], base, config)
