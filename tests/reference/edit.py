"""The published code of DiffEditor: masks, energies, start latents, attention and loop, rounding and slips included.

Sources: DragonDiffusion (arXiv 2307.02421), DiffEditor (arXiv 2402.02583). What is known to be wrong in it stays wrong here and
is named where it happens; `slipstream.edit` has none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from slipstream.core.attention import Attend, AttentionBank, token_grid
from slipstream.core.denoiser import Conditioning
from slipstream.core.guidance import cfg
from slipstream.core.noise import NoiseSource
from slipstream.core.progress import Callback, Reporter
from slipstream.core.schedules import make_sigmas
from slipstream.edit import Appearance, Canvas, Drag, EditResult, Inversion, Move, Paste
from slipstream.edit.tasks import Point, Task, check_points
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]
Masks = dict[str, Tensor]
STEPS = 50
GUIDED = frozenset(range(10)) | frozenset(range(10, 30, 2))
NOISY, IMAGE_PROMPT = range(11, 20), range(10, 20)
TRAVEL, PASSES = (22, 24, 26, 28), 3
CELL = 4  # image pixels of a feature pixel: maps are blown up to twice the latents' size
LATENT = 8  # image pixels of a latent cell: the published code knows factor 8 only


@dataclass(frozen=True)
class PublishedConfig:
    """The sliders of the published demo; `keys` are the steps whose self-attention reads the bank."""

    cfg_scale: float = 4.0
    energy_scale: float = 0.5
    w_edit: float = 4.0
    w_content: float = 6.0
    w_contrast: float = 0.2
    w_inpaint: float = 0.8
    eta: float = 0.4
    keys: range = range(5, STEPS)


_CROSS = range(0, 36)
DEFAULTS: Mapping[str, PublishedConfig] = MappingProxyType(
    {
        "move": PublishedConfig(),
        "drag": PublishedConfig(energy_scale=2.0, w_inpaint=0.2),
        "appearance": PublishedConfig(cfg_scale=5.0, energy_scale=2.0, w_edit=3.5, w_content=5.0, keys=_CROSS),
        "paste": PublishedConfig(energy_scale=1.5, keys=_CROSS),
        "landmarks": PublishedConfig(energy_scale=3.0, w_edit=12.0, w_content=0.0, w_inpaint=0.4, eta=0.2),
    }
)


@dataclass(frozen=True, eq=False)
class Landmarks(Task):
    """The face mode: drag points without a mask, noise everywhere."""

    points: Sequence[tuple[Point, Point]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", check_points(self.points))


def nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, H, W) by nearest neighbour."""
    return F.interpolate(x.float(), tuple(size), mode="nearest")


def binary(mask: Tensor) -> Tensor:
    """Return a pixel mask (..., H, W) as (1, 1, H, W) of zeros and ones."""
    return (mask.reshape(1, 1, *mask.shape[-2:]) > 0.5).float()


# --- masks (1.4) ---


def _placed(mask: Tensor, dx: float, dy: float, scale: float, cell: int) -> tuple[Tensor, Tensor]:
    """Return a pixel mask scaled about the image's centre at its own scaled grid, and rolled onto the grid of the image."""
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
            raise ValueError("Expected the scaled object within the image, but got one that leaves it. Scale it less.")
        return out
    top, left = (height - h) // 2, (width - w) // 2
    return F.pad(x, (left, width - w - left, top, height - h - top))


def move_masks(mask: Tensor, dx: float, dy: float, scale: float, input_scale: float = 1.0) -> Masks:
    """Return the masks of a move at feature size; shifts in image pixels."""
    mask = binary(mask)
    org = nearest(mask, (mask.shape[-2] // CELL, mask.shape[-1] // CELL)) > 0.5
    target, current = _placed(mask, dx * input_scale, dy * input_scale, scale, CELL)
    return {
        "tar": target, "cur": current, "other": ~(current | org), "overlap": current & org, "non_overlap": org & ~current,
    }  # fmt: skip


def drag_masks(mask: Tensor, points: Sequence[tuple[Point, Point]]) -> Masks:
    """Return the 3 x 3 blocks of every handle and target (P, h, w) at feature size, and what lies outside `mask`.

    x is clipped with the height, as published: wrong on landscape images.
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
    """Return the target region of a paste and, cell for cell, the region of the reference; "_pixels" at image size."""
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
# Features: lists of maps (1, C, 2h, 2w), F the current ones, R the base image's, Q the reference image's.


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
    weights: PublishedConfig,
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


def drag_energy(
    current: list[Tensor], base: list[Tensor], masks: Masks, weights: PublishedConfig
) -> tuple[Tensor, Tensor]:
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
    current: list[Tensor],
    base: list[Tensor],
    reference: list[Tensor],
    masks: Masks,
    weights: PublishedConfig,
    local: bool,
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


class Pull(NamedTuple):
    """One energy and the region (1, 1, h, w) of the latents that its gradient may move."""

    energy: Tensor
    region: Tensor


class PublishedEdit:
    """One published edit of one image."""

    noise_strength: Tensor
    factor = 0.04

    def __init__(self, task: Task, base: Inversion, config: PublishedConfig) -> None:
        self.base, self.config = base, config
        self.pictures: list[Inversion] = [base]
        self.grid = (base.latents.shape[-2], base.latents.shape[-1])
        self.features_size = (2 * self.grid[0], 2 * self.grid[1])
        self.whole = torch.ones(1, 1, *self.grid)
        self.started = base.at(0).clone()
        self.slips_into_reference = False

    def reference(self, index: int, step: int) -> Tensor:
        """Return the latents of image `index` whose features the energies compare with."""
        # Published drag edits the inverted noise in place, so that step 0 has no pull back to the image.
        return self.started if self.slips_into_reference and step == 0 else self.pictures[index].at(step)

    def energies(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        raise NotImplementedError

    def pulls(self, current: list[Tensor], references: list[list[Tensor]]) -> list[Pull]:
        blown_up = [[nearest(f, self.features_size) for f in maps] for maps in (current, *references)]
        return self.energies(blown_up[0], blown_up[1:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend) -> Tensor:
        raise NotImplementedError

    def scale(self, gradients: Sequence[Tensor], pulls: Sequence[Pull], eps: Tensor) -> Tensor:
        weight = self.factor * 1000 * self.config.energy_scale
        return sum((weight * g * p.region for g, p in zip(gradients, pulls)), torch.zeros_like(eps))

    def to_grid(self, mask: Tensor) -> Tensor:
        """Return a mask (..., H, W) of any size at latent size."""
        return (nearest(mask.reshape(1, 1, *mask.shape[-2:]), self.grid) > 0.5).float()


class PublishedMove(PublishedEdit):
    factor = 0.08

    def __init__(self, task: Move, base: Inversion, config: PublishedConfig) -> None:
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend) -> Tensor:
        return attend(q, *(t.expand(len(q), -1, -1) for t in pictures[0]))


class PublishedPoints(PublishedEdit):
    """Drag and landmarks: the image's keys and values are read beside the own ones."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend) -> Tensor:
        own = zip((k, v), pictures[0])
        return attend(q, *(torch.cat([mine, kept.expand(len(q), -1, -1)], 1) for mine, kept in own))


class PublishedDrag(PublishedPoints):
    def __init__(self, task: Drag, base: Inversion, config: PublishedConfig) -> None:
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
    def __init__(self, task: Landmarks, base: Inversion, config: PublishedConfig) -> None:
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pictures: Sequence[KeyValue], attend: Attend) -> Tensor:
        grid = token_grid(pictures[0][0].shape[1], *self.grid)
        outside = ~self._tokens("base_pixels", grid)
        inside = self._tokens("replace_pixels", grid)
        parts = zip(*pictures)
        return attend(q, *(torch.cat([b[:, outside], r[:, inside]], 1).expand(len(q), -1, -1) for b, r in parts))

    def _tokens(self, name: str, grid: tuple[int, int]) -> Tensor:
        return (nearest(self.masks[name], grid) > 0.5).flatten()


class PublishedAppearance(PublishedCross):
    def __init__(self, task: Appearance, base: Inversion, config: PublishedConfig) -> None:
        super().__init__(task, base, config)
        masks = {"base_pixels": binary(task.mask) > 0.5, "replace_pixels": binary(task.reference_mask) > 0.5}
        for name in ("base", "replace"):
            masks[name] = nearest(masks[name + "_pixels"], self.features_size) > 0.5
        self.prepare(masks, task.reference)


class PublishedPaste(PublishedCross):
    """The reference must be the inversion of the image scaled about its centre by the task's scale (`scale_about_centre`)."""

    local = True

    def __init__(self, task: Paste, base: Inversion, config: PublishedConfig) -> None:
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


# --- inversion and sampling (1.2 and 1.7) ---


def published_sigmas(model: Any) -> Tensor:
    """Return the 51 descending levels; the last is the first training level, not 0."""
    sigmas = make_sigmas("leading", model.levels, STEPS).cpu()
    sigmas[-1] = float(model.levels.sigma_min)
    return sigmas


def spread(sigma: Tensor) -> Tensor:
    """Return how much larger variance-exploding latents are than the variance-preserving ones of the published code."""
    return (1 + sigma**2).sqrt()


@torch.no_grad()
def invert_published(
    model: Any,
    latents: Tensor,
    cond: Conditioning,
    config: PublishedConfig,
    canvas: Canvas,
    image: Tensor | None = None,
) -> Inversion:
    """Return the published inversion of clean latents (1, 4, h, w), the keys and values of `config.keys` in its bank."""
    sigmas, bank = published_sigmas(model), AttentionBank(budget=1 << 62)
    path = [latents * spread(sigmas[-1])]
    for step in reversed(range(STEPS)):
        low, high = sigmas[step + 1], sigmas[step]
        # The latents of the lower level, asked at the time of the higher one.
        seen = path[-1] * spread(high) / spread(low)
        if step in config.keys:
            with model.self_attention(bank.recorder(step)):
                denoised = model(seen, high.expand(1), cond)
        else:
            denoised = model(seen, high.expand(1), cond)
        path.append(path[-1] + (high - low) * (seen - denoised) / high)
    return Inversion(torch.cat(path[::-1]), sigmas, cond, canvas, image, bank, "bank")


@torch.no_grad()
def edit_published(
    model: Any, inversion: Inversion, task: Task, cond: Conditioning, uncond: Conditioning, config: PublishedConfig,
    noise: NoiseSource, image_model: Any = None, callback: Callback | None = None,
) -> EditResult:  # fmt: skip
    """Return the published edit by one task; `image_model` (the network with an image prompt) is asked in steps 10 to 19."""
    problem = EDITS[type(task)](task, inversion, config)
    energy = config.energy_scale > 0
    calls = STEPS + energy * ((1 + len(problem.pictures)) * (len(GUIDED) + 2 * len(TRAVEL)) + 5 * len(TRAVEL))
    report, sigmas, x = Reporter(calls, callback), inversion.sigmas, problem.started
    for step in range(STEPS):
        high, low = sigmas[step], sigmas[step + 1]
        travels = energy and step in TRAVEL
        for _ in range(PASSES if travels else 1):
            asked = image_model if image_model is not None and step in IMAGE_PROMPT else model
            denoised, eps = _estimate(asked, problem, x, step, uncond.join(cond))
            guidance = torch.zeros_like(x)
            if energy and step in GUIDED:
                guidance = _guidance(model, problem, x, step, eps, report)
            after = _step(x, denoised - high * guidance, eps, high, low, problem, noise if step in NOISY else None)
            report("edit", low, denoised)
            if travels:  # the third of these is thrown away
                again = model(after, low.expand(1), cond)
                x = after + (high - low) * (after - again) / low
                report("rewind", high, again)
        x = after
    everywhere = torch.ones(1, *inversion.canvas.size)
    return EditResult(x / spread(sigmas[-1]), everywhere, (), None, None, everywhere)


def _estimate(model: Any, problem: PublishedEdit, x: Tensor, step: int, conds: Conditioning) -> tuple[Tensor, Tensor]:
    """Return (denoised, eps) under classifier-free guidance; within `keys` the decoder reads the images' bank."""
    sigma, config = problem.base.sigmas[step], problem.config

    def hook(layer: str, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        kept = [p.bank.get(step, layer, k) for p in problem.pictures if p.bank is not None]
        return problem.attend(q, k, v, kept, attend)

    rows, levels = x.expand(2, -1, -1, -1), sigma.expand(2)
    if step in config.keys:
        with model.self_attention(hook):
            out = model(rows, levels, conds)
    else:
        out = model(rows, levels, conds)
    denoised = cfg(out[:1], out[1:], config.cfg_scale)
    return denoised, (x - denoised) / sigma


def _guidance(model: Any, problem: PublishedEdit, x: Tensor, step: int, eps: Tensor, report: Reporter) -> Tensor:
    """Return the regional gradients of the energies with respect to variance-preserving latents, added to eps."""
    sigma = problem.base.sigmas[step]
    references = []
    for index in range(len(problem.pictures)):
        # Every image's features are taken under the base image's prompt.
        references.append(model.features(problem.reference(index, step), sigma.expand(1), problem.base.cond))
        report("compare", sigma)
    with torch.enable_grad():
        z = (x / spread(sigma)).detach().requires_grad_(True)
        pulls = problem.pulls(model.features(z * spread(sigma), sigma.expand(1), problem.base.cond), references)
        gradients = [torch.autograd.grad(p.energy, z, retain_graph=True)[0] for p in pulls]
    report("guide", sigma)
    return problem.scale([torch.nan_to_num(g, 0.0, 0.0, 0.0) for g in gradients], pulls, eps)


def _step(
    x: Tensor,
    denoised: Tensor,
    eps: Tensor,
    high: Tensor,
    low: Tensor,
    problem: PublishedEdit,
    noise: NoiseSource | None,
) -> Tensor:
    """Step down along the unguided `eps` from the guided `denoised`, with fresh noise in the region of the edit."""
    if noise is None or problem.config.eta == 0:
        return denoised + low * eps
    added = problem.noise_strength * (low / high) * (high**2 - low**2).sqrt()
    return denoised + (low**2 - added**2).sqrt() * eps + added * noise(x)
