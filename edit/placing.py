"""From tasks to places: what each covers, takes away and uncovers in the image, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.masks import bounding_box, feather, grow, snapped, touched
from .geometry import Affine, Canvas, Photo, Placement, bent, centre_of, freedom, sample_at
from .invert import Inversion
from .pixels import draft, hard_edged
from .tasks import Appearance, Drag, Move, Paste, Remove, Task

# What is less free than this share, of the place that it would be pulled to or of 1, stays where it is.
STAYS = 0.25


def place(task: Move | Paste | Drag, canvas: Canvas, source: Canvas, hard: bool = False) -> Placement:
    """Return where a task puts things, per pixel of the image. Also what a preview draws.

    `hard`: what is carried has hard edges in its own image (`hard_edged`), and keeps them.
    """
    pixels = canvas.pixel_centres()
    if isinstance(task, Drag):
        free = freedom(task.mask, [target for _, target in task.points])
        points = bent(pixels, list(task.points), free)
        moved = ((points - pixels).norm(dim=-1) > 0.25) & (task.mask > 0.5)
        # What stays at the mask's edge and beyond must not come along too and be seen twice.
        origin = sample_at(free[None, None], points, canvas.size)[0, 0]
        torn = (uncovered(points) > 0) | (origin < STAYS * free)
        moved = (moved & ~(torn & (free < STAYS))).float()
        torn = torn * moved
        return Placement(moved * (1 - torn), torn, torn, points, bends=True)
    points = affine_of(task).inverse(pixels)
    target = snapped(sample_at(task.mask[None, None], points, source.size)[0, 0])
    target = (target >= 0.5).float() if hard else target
    removed = task.mask if isinstance(task, Move) else torch.zeros_like(target)
    return Placement(target, removed, (removed - target).clamp(min=0), points, source=task.mask, hard=hard)


def affine_of(task: Move | Paste) -> Affine:
    """Return where a task takes the pixels of its object."""
    return Affine(centre_of(task.mask, task.about), task.scale, (task.dx, task.dy), task.angle)


def uncovered(points: Tensor, least: float = 0.5) -> Tensor:
    """Return where (H, W) a map of origins (H, W, 2) tears open and content must be made up: source area below `least`, or folded."""
    padded = F.pad(rearrange(points, "h w xy -> 1 xy h w"), (0, 1, 0, 1), mode="replicate")
    padded = rearrange(padded, "1 xy h w -> h w xy")
    across, down = padded[:-1, 1:] - padded[:-1, :-1], padded[1:, :-1] - padded[:-1, :-1]
    area = across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0]
    area[:, -1], area[-1] = area[:, -2], area[-2]
    return (area < least).float()


def carried_share(task: Move | Paste, placement: Placement) -> float:
    """Return the share of the object that lands within the image."""
    return float(placement.target.sum() / (task.mask.sum() * task.scale**2))


@dataclass(frozen=True, eq=False)
class Layout:
    """Tasks in their places on a photo.

    `photos` are the photo itself, then the references; `sources[i]` is the index of the one that task i takes from, 0 for the
    photo itself. `notes` tell what could be done in part only.
    """

    tasks: tuple[Task, ...]
    photos: tuple[Photo | Inversion, ...]
    sources: tuple[int, ...]
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]

    @property
    def canvases(self) -> list[Canvas]:
        return [photo.canvas for photo in self.photos]

    @property
    def carried(self) -> list[tuple[int, Placement]]:
        """(source, placement) of the tasks that carry something."""
        return [(source, placed) for source, placed in zip(self.sources, self.placements) if placed.carries]

    def draft(self) -> tuple[Tensor, Tensor] | None:
        """Return the cut-and-paste IMAGE (1, H, W, 3) and where (H, W) its fill is sure; None when the pixels of a photo are not known."""
        images = [photo.image for photo in self.photos if photo.image is not None]
        if len(images) < len(self.photos):
            return None
        pixels = [rearrange(image.float().cpu(), "b h w c -> b c h w") for image in images]
        drafted, sure = draft(pixels, [canvas.size for canvas in self.canvases], self.carried)
        return rearrange(drafted, "b c h w -> b h w c").clamp(0, 1), sure

    def changed(self, soft: int) -> tuple[Tensor, Tensor]:
        """Return masks (1, H, W) of the image: what changes, with a soft edge of `soft` pixels, and where lost detail is put back."""
        height, width = self.canvases[0].size
        mask, restore = torch.zeros(1, height, width), torch.ones(1, height, width)
        for placed in self.placements:
            changed = touched(torch.maximum(placed.target, placed.removed)).float()[None]
            mask = torch.maximum(mask, changed)
            if not placed.carries or not placed.keeps:  # repainted: the old detail must not come back
                restore = restore * (1 - changed)
        reach = min(soft, min(height, width) // 2)
        return (feather(grow(mask, reach), reach) if reach else mask), restore


def lay_out(tasks: Sequence[Task], photo: Photo | Inversion, looks: bool = False) -> Layout:
    """Return the tasks in their places on a photo, each placed once; raises ValueError for what cannot be done.

    With `looks` an Appearance carries the look of its reference, for a draft; without, its target is repainted.
    """
    photos, sources, notes = [photo], [], list[str]()
    for task in tasks:
        own = getattr(task, "reference", photo)
        if not any(own is other for other in photos):
            photos.append(own)
        sources.append(next(n for n, other in enumerate(photos) if own is other))
    canvases = [p.canvas for p in photos]
    placements = [_place(task, canvases[0], photos[source], notes) for task, source in zip(tasks, sources)]
    if looks:
        placements = [
            _with_look(t, placed) if isinstance(t, Appearance) else placed for t, placed in zip(tasks, placements)
        ]
    for (a, first), (b, second) in combinations(zip(tasks, placements), 2):
        _check_pair(a, first, b, second)
    return Layout(tuple(tasks), tuple(photos), tuple(sources), tuple(placements), tuple(notes))


def check_size(name: str, mask: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError unless a mask (H, W) has an image's size (H, W)."""
    if tuple(mask.shape) != size:
        raise ValueError(
            f"Expected `{name}` of the image's size {size[1]} x {size[0]}, but got {mask.shape[1]} x {mask.shape[0]}. "
            "Paint it on this image, or resize it."
        )


def _place(task: Task, base: Canvas, photo: Photo | Inversion, notes: list[str]) -> Placement:
    own = photo.canvas
    if isinstance(task, Appearance):
        check_size("mask", task.mask, base.size)
        check_size("reference_mask", task.reference_mask, own.size)
        return _in_place(task.mask, base)
    assert isinstance(task, (Move, Paste, Drag, Remove))
    check_size("mask", task.mask, own.size)
    if isinstance(task, Move) and task.fill_from is not None:
        check_size("fill_from", task.fill_from, base.size)
    if isinstance(task, Drag):
        for point in [p for pair in task.points for p in pair]:
            if not (0 <= point[0] <= base.size[1] and 0 <= point[1] <= base.size[0]):
                raise ValueError(
                    f"Expected points within {base.size[1]} x {base.size[0]} pixels, but got {point}. Pull it into the image."
                )
        if task.method == "energy":
            return _in_place(task.mask, base)
        _check_targets_inside(task)
        return place(task, base, own)
    if isinstance(task, (Move, Remove)) and bool(touched(task.mask).all()):
        raise ValueError(
            "Expected `mask` that leaves a part of the image free, but got one that covers all of it. Paint the object only."
        )
    if isinstance(task, Remove):
        none = torch.zeros_like(task.mask)
        return Placement(none, task.mask, task.mask, base.pixel_centres(), source=task.mask)
    placed = place(task, base, own, photo.image is not None and hard_edged(photo.image, task.mask))
    share = carried_share(task, placed)
    if not bool((placed.target > 0.5).any()):
        raise ValueError(
            f"Expected an object that stays in the image, but got one moved out by ({task.dx:g}, {task.dy:g}) pixels. Move it less."
        )
    if share < 0.98:
        notes.append(f"{1 - share:.0%} of the object lies outside the image after the edit and was cut off.")
    return placed


def _with_look(task: Appearance, placed: Placement) -> Placement:
    """Return the placement of a look: the bounding box of the reference's object stretched over that of the target."""
    base, own = (
        torch.tensor([[left, top], [right, bottom]])
        for top, left, bottom, right in (bounding_box(task.mask), bounding_box(task.reference_mask))
    )
    share = (placed.points - base[0]) / (base[1] - base[0])
    return replace(
        placed, points=own[0] + share * (own[1] - own[0]), source=task.reference_mask, carries=True, keeps=False
    )


def _in_place(mask: Tensor, canvas: Canvas) -> Placement:
    """Return the placement of a task that repaints its target where it is."""
    none = torch.zeros_like(mask)
    return Placement(mask, none, none, canvas.pixel_centres(), carries=False)


def _check_targets_inside(task: Drag) -> None:
    height, width = task.mask.shape
    for _, (x, y) in task.points:
        if task.mask[min(int(y), height - 1), min(int(x), width - 1)] <= 0.5:
            raise ValueError(
                f"Expected targets within `mask`, but got ({x:g}, {y:g}). Paint the mask to where the drag goes."
            )


def _overlap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return 0.0
    return float(torch.minimum(a, b).sum() / min(a.sum(), b.sum()).clamp(min=1))


def _check_pair(a: Task, first: Placement, b: Task, second: Placement) -> None:
    names = f"{type(a).__name__} and {type(b).__name__}"
    if _overlap(first.target, second.target) > 0.5:
        raise ValueError(f"Expected tasks with separate targets, but got {names} on one place. Do one after the other.")
    takes = [t for t in (a, b) if isinstance(t, (Move, Drag, Remove))]
    if len(takes) == 2 and _overlap(takes[0].mask, takes[1].mask) > 0.5:
        raise ValueError(
            f"Expected tasks on different objects, but got {names} on the same one. Do one after the other."
        )
    for task, other, placed in ((a, b, second), (b, a, first)):
        if (
            isinstance(task, (Move, Remove))
            and isinstance(other, Appearance)
            and _overlap(task.mask, placed.target) > 0.5
        ):
            raise ValueError(f"Expected tasks on different objects, but got {names} on the same one. Move it first.")
