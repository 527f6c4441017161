"""The canvas: a subject cut from a photo, placed on a background, with a mask of what to keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_finite, check_integer, check_range
from ..core.images import cover, pad_to_multiple, resize_premultiplied
from ..core.masks import RESIDUE, as_mask, bounding_box, feather, grow, resize_mask, snapped, touched
from ..core.noise import NoiseSource
from ..core.tensors import composite, fill, image_to_pixels, pixels_to_image

GREY = "#808080"


@dataclass(frozen=True)
class Canvas:
    """A subject on its background.

    `image` (B, H, W, 3) goes to the VAE; `keep` (B, H, W) is 1 on the subject and soft where the cut-out is; `photo` (B, H, W, 3)
    is the placed photo itself, not mixed with the background, for pasting original pixels back.
    """

    image: Tensor
    keep: Tensor
    photo: Tensor


def place(
    image: Tensor, keep: Tensor, background: Tensor, scale: float = 1.0, x: float = 0.5, y: float = 0.5, grid: int = 8,
    mirror: bool = False, filling: float = 1.0,
) -> Canvas:  # fmt: skip
    """Return `image` (B, H, W, C) cut out by `keep` (B, H, W; 1 = keep) on `background` (1 or B, H', W', 3).

    The subject is the mask's bounding box, resized by `scale` with its proportions kept. `x` and `y` share out the free
    space: 0 and 1 touch the edges, 0.5 is the middle; in between the corner snaps to multiples of `grid` pixels, so that
    the subject falls on whole latent cells. `mirror` turns the subject left to right. `filling` (see `canvas_size`) is the scale of
    the photo that counts as a `scale` of 1.

    A subject that is larger than the canvas by up to half of `grid`, as a canvas may be that follows the photo, is cropped. Raises
    ValueError for an empty mask and a canvas that is smaller still.
    """
    check_range("scale", scale * filling, 0.001, 100)
    check_range("x", x, 0, 1, "It is a share of the free space.")
    check_range("y", y, 0, 1, "It is a share of the free space.")
    photo = (image_to_pixels(image) + 1) / 2
    masks = as_mask(keep, len(photo), photo.shape[-2], photo.shape[-1], "keep")
    if mirror:
        photo, masks = photo.flip(-1), masks.flip(-1)
    background = _matching(background, len(photo))
    placed = [_place_one(*row, scale, x, y, grid, filling) for row in zip(photo, masks, background)]
    return Canvas(*(torch.stack(part) for part in zip(*placed)))


def _place_one(
    photo: Tensor, keep: Tensor, background: Tensor, scale: float, x: float, y: float, grid: int, filling: float
) -> tuple[Tensor, Tensor, Tensor]:
    top, left, bottom, right = bounding_box(keep, RESIDUE, "keep")
    height, width = (max(1, round(side * (scale * filling))) for side in (bottom - top, right - left))
    room = background.shape[0] - height, background.shape[1] - width
    if min(room) < -grid / 2:
        fitting = min(background.shape[0] / (bottom - top), background.shape[1] / (right - left))
        most = int(fitting / filling * 1000) / 1000
        raise ValueError(
            f"Expected a canvas of at least {width} x {height} pixels for the subject at `scale` {scale}, but got "
            f"{background.shape[1]} x {background.shape[0]}. Use a larger canvas, or a scale of at most {most}."
        )
    part = (..., slice(top, bottom), slice(left, right))
    cut = resize_premultiplied(photo[None][part], keep[None, None][part], height, width, "bicubic")[0]
    at = _snap(y, room[0], grid), _snap(x, room[1], grid)
    cut = cut[:, max(0, -at[0]) :, max(0, -at[1]) :]
    spot = slice(max(0, at[0]), at[0] + height), slice(max(0, at[1]), at[1] + width)
    placed_photo, placed_keep = background.clone(), background.new_zeros(background.shape[:2])
    placed_photo[spot] = cut[:3].movedim(0, -1)
    # Resizing leaves 0.9999 where all was kept; pasting is exact at 0 and 1 only.
    placed_keep[spot] = snapped(cut[3])
    return composite(background[None], placed_photo[None], placed_keep[None])[0], placed_keep, placed_photo


def _snap(share: float, room: int, grid: int) -> int:
    return room if share == 1 else min(round(share * room / grid) * grid, room)


def _matching(background: Tensor, batch: int) -> Tensor:
    if background.ndim != 4 or background.shape[-1] not in (3, 4):
        raise ValueError(
            f"Expected `background` of shape (batch, height, width, 3), but got {tuple(background.shape)}."
        )
    check_finite("background", background)
    if len(background) not in (1, batch):
        raise ValueError(f"Expected `background` with 1 or {batch} images, but got {len(background)}.")
    return background[..., :3].float().expand(batch, -1, -1, -1)


def canvas_size(
    photo: tuple[int, int], width: int = 0, height: int = 0, pixels: int | None = None, grid: int = 8
) -> tuple[int, int, float]:
    """Return (height, width) of a canvas for a photo (height, width), and the scale at which the photo fills it.

    A side of 0 follows the other one by the proportions of the photo; both 0 give its size, or `pixels` in all. Where both are
    given, the photo is placed in its own pixels: the scale is 1.
    """
    check_integer("width", width, 0, 16384)
    check_integer("height", height, 0, 16384)
    if width and height:
        return height, width, 1.0
    tall, wide = photo
    if width or height:
        scale = width / wide if width else height / tall
    else:
        scale = 1.0 if pixels is None else (pixels / (wide * tall)) ** 0.5
    rounded = [max(grid, round(side * scale / grid) * grid) for side in photo]
    return height or rounded[0], width or rounded[1], scale


def plain_background(height: int, width: int, colour: str = GREY) -> Tensor:
    """Return IMAGE (1, height, width, 3) of one colour, given as "#rrggbb"."""
    _check_size(height, width)
    return torch.tensor(parse_colour(colour)).expand(1, height, width, 3).clone()


def parse_colour(colour: str) -> tuple[float, ...]:
    """Return red, green and blue in [0, 1] of "#rrggbb"; raises ValueError for anything else."""
    if not re.fullmatch(r"#?[0-9a-fA-F]{6}", colour.strip()):
        raise ValueError(f"Expected `colour` as #rrggbb, but got {colour!r}. Grey is {GREY}.")
    return tuple(v / 255 for v in bytes.fromhex(colour.strip().lstrip("#")))


def noise_background(height: int, width: int, noise: NoiseSource) -> Tensor:
    """Return IMAGE (1, height, width, 3) of independent grey-centred noise."""
    _check_size(height, width)
    return (0.5 + 0.25 * noise(torch.empty(1, height, width, 3))).clamp(0, 1)


def image_background(image: Tensor, height: int, width: int) -> Tensor:
    """Return IMAGE (B, height, width, 3) that `image` (B, H, W, C) fills, its proportions kept and its overhang cropped."""
    _check_size(height, width)
    return cover(pixels_to_image(image_to_pixels(image)), height, width)


def _check_size(height: int, width: int) -> None:
    check_integer("height", height, 1, 16384)
    check_integer("width", width, 1, 16384)


def paste_mask(keep: Tensor, softness: int = 0) -> Tensor:
    """Return where original pixels come back, from a canvas's `keep` (B, H, W): faded over `softness` pixels inside its edge."""
    check_integer("softness", softness, 0, max(0, min(keep.shape[-2:]) - 1))
    return keep if softness == 0 else torch.minimum(keep, feather(grow(keep, -softness), softness))


def on_scene(scene: Tensor, photo: Tensor, keep: Tensor, reach: int = 8) -> Tensor:
    """Return `scene` (B, H, W, 3) with the subject of `photo` (B or 1, H, W, 3) in it where `keep` (B or 1, H, W) is 1.

    The scene has an outline of the subject of its own (`outline`), which is filled smoothly from beyond.
    """
    batch, height, width = scene.shape[:3]
    keep = as_mask(keep.to(scene), batch, height, width, "keep")
    return composite(_without(scene, outline(scene, keep, reach)), photo.to(scene).expand_as(scene), keep)


def outline(scene: Tensor, keep: Tensor, reach: int = 8) -> Tensor:
    """Return where (B, H, W) a scene (B, H, W, 3) shows a subject, with the `reach` pixels around `keep` (B, H, W), a cell of the latents.

    From the subject it extends, up to an eighth of the shorter side, over places that belong to it by `nearest`. It is found on a
    grid of about 64 x 64 places.
    """
    height, width = scene.shape[1:3]
    size = [math.ceil(side * min(1, 64 / math.sqrt(height * width))) for side in (height, width)]
    far, share = min(size) // 8, resize_mask(keep, *size)
    subject = touched(share).to(scene)
    around = grow(subject, far)
    points = colour_and_place(F.interpolate(scene.movedim(-1, 1), size, mode="area").movedim(1, -1))
    inside, like = share >= share.amax((1, 2), keepdim=True) / 2, torch.zeros_like(subject)
    for row, at in enumerate(around > subject):
        like[row, at] = nearest(points[row, at], points[row, inside[row]], points[row, around[row] == 0]).to(scene)
    found = subject
    for _ in range(far):
        found = torch.maximum(found, grow(found, 1) * like)
    found = grow(found * like, 1) * around  # at its rim the colour is between the two
    fine = F.interpolate(found[:, None], (height, width), mode="nearest-exact")[:, 0]
    return torch.maximum(grow(touched(keep).to(scene), reach), fine)


def colour_and_place(image: Tensor) -> Tensor:
    """Return (B, H, W, 5) of an image (B, H, W, 3): its colours, and its places as shares of the shorter side."""
    batch, height, width = image.shape[:3]
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack(grid, -1).to(image) / min(height, width)
    return torch.cat([image, place.expand(batch, -1, -1, -1)], -1)


def nearest(points: Tensor, subject: Tensor, scene: Tensor) -> Tensor:
    """Return which (N,) of `points` (N, 5) have their nearest point, in colour and place, in `subject` (M, 5) and not in `scene` (K, 5).

    So what a scene has of the subject's colours is the scene's, where it is nearer to more of it. None are where one of them is empty.
    """
    if not len(subject) or not len(scene):
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    return torch.cdist(points, subject).amin(1) < torch.cdist(points, scene).amin(1)


def _without(image: Tensor, hole: Tensor) -> Tensor:
    """Return `image` (B, H, W, 3) filled from around `hole` (B, H, W); as it is where nothing is around it."""
    filled = fill(image.movedim(-1, 1), 1 - hole[:, None]).movedim(1, -1)
    return torch.where((hole == 1).all(-1).all(-1)[:, None, None, None], image, filled)


def padded(canvas: Canvas, multiple: int) -> Canvas:
    """Return the canvas with its last row and column repeated until both sides are multiples, as a VAE wants them."""
    image, keep, photo = (
        pad_to_multiple(part, multiple) for part in (canvas.image, canvas.keep[..., None], canvas.photo)
    )
    return Canvas(image, keep[..., 0], photo)


def paste_back(image: Tensor, canvas: Canvas, softness: int = 0) -> Tensor:
    """Return `image` (B, H, W, 3) with the photo's own pixels where the subject is; exact where the mask is 1."""
    return composite(image, canvas.photo.to(image), paste_mask(canvas.keep, softness).to(image))
