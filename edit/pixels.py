"""Images on their way in and out: padding to whole cells, the draft of an edit, and the composite that leaves the rest untouched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..core.checks import check_finite, check_integer
from ..core.images import pad_to_multiple
from ..core.masks import RESIDUE, bounding_box, grow, touched
from ..core.tensors import composite, fill
from .filling import refilled
from .geometry import Canvas, Placement, sample_at


@dataclass(frozen=True)
class EditResult:
    """What `edit` returns.

    `latents` (1, C, h, w) are clean. `mask` (1, H, W) at image size is the soft region that changed; `finish` composites with
    it. `notes` tell what the user should know (clipped objects, exploded energies, memory choice). `draft` (1, H, W, 3) is the
    cut-and-paste in pixels with its `draft_latents`, and `restore` (1, H, W) where its detail may be put back.
    """

    latents: Tensor
    mask: Tensor
    notes: tuple[str, ...]
    draft: Tensor | None
    draft_latents: Tensor | None
    restore: Tensor


Encode = Callable[[Tensor], Tensor]
# The least change of a pixel that is put into the image: two steps of 8 bits.
LEAST = 2 / 255


def fit(image: Tensor, factor: int, max_pixels: int | None = None, like: Canvas | None = None) -> tuple[Tensor, Canvas]:
    """Return an IMAGE (1, H, W, 3) ready for a VAE of `factor`, and the canvas that says where its pixels went.

    Sides that are no multiple of `factor` are padded on the right and below by replication; an image of more than `max_pixels`
    is reduced first, and coordinates stay those of the image that was given. `like` repeats what made that canvas.
    """
    if image.ndim != 4 or len(image) != 1 or image.shape[-1] != 3:
        raise ValueError(
            f"Expected `image` as one RGB image (1, height, width, 3), but got {tuple(image.shape)}. Edit one image at a time."
        )
    check_finite("image", image)
    check_integer("factor", factor, 1)
    height, width = image.shape[1:3]
    shrink = 1.0 if not max_pixels else min(1.0, math.sqrt(max_pixels / (height * width)))
    shrink = shrink if like is None else factor / like.cell
    pixels = rearrange(image, "b h w c -> b c h w")
    if shrink < 1:
        # One factor for both axes keeps every coordinate exact: the rest of the last cell is padding.
        size = (round(height * shrink), round(width * shrink))
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    padded = pad_to_multiple(rearrange(pixels, "b c h w -> b h w c"), factor)
    grid = padded.shape[1] // factor, padded.shape[2] // factor
    return padded, Canvas((height, width), grid, factor / shrink)


def draft(
    values: Sequence[Tensor], sizes: Sequence[tuple[int, int]], placements: Sequence[tuple[int, Placement]]
) -> tuple[Tensor, Tensor]:
    """Return the cut-and-paste of an edit, and where (H, W) its fill is sure: objects carried to their places, vacated areas filled.

    `values[i]` (1, C, H_i, W_i) is image i in any space (pixels, latents), `sizes[i]` its extent in the unit of the placements'
    points. Placements are (image index, Placement) at the resolution of `values[0]`; later ones lie on top.
    """
    out, sure = refilled(values[0], [placed.removed for _, placed in placements if not placed.bends])
    for index, placed in placements:
        carried = _carried(values[index], placed, sizes[index])
        out = out + placed.target[None, None].to(out) * (carried - out)
    bends = [placed for _, placed in placements if placed.bends]
    # What a bend carries is the object, at least in part: it must not come up behind itself.
    objects = torch.stack([placed.target for placed in bends]).amax(0) if bends else None
    out, torn = refilled(out, [placed.removed for placed in bends], objects)
    return out, torch.maximum(sure, torn)


def hard_edged(image: Tensor, mask: Tensor, reach: int = 2) -> bool:
    """Return whether most edges of an IMAGE (1, H, W, 3) at and around a mask (H, W) lie between two pixels, as in flat drawings and
    screenshots: the same colour twice, then another one twice. A photo and antialiased shapes have next to none."""
    top, left, bottom, right = bounding_box(mask)
    part = slice(max(0, top - reach - 2), bottom + reach + 2), slice(max(0, left - reach - 2), right + reach + 2)
    near, within = image[0][part], grow(mask[None], reach)[0][part] > 0.5
    edges = hard = 0
    for pixels, inside in ((near, within), (near.transpose(0, 1), within.T)):
        differ = (pixels[1:] != pixels[:-1]).any(-1)
        edge = differ[1:-1] & inside[1:-2] & inside[2:-1]
        edges, hard = edges + int(edge.sum()), hard + int((edge & ~differ[:-2] & ~differ[2:]).sum())
    return hard > 0.5 * edges


def _carried(values: Tensor, placed: Placement, size: tuple[int, int]) -> Tensor:
    """Return values (1, C, H_s, W_s) read where a placement takes them from, premultiplied by the object's mask if it is known."""
    if placed.source is None:
        return sample_at(values, placed.points, size)
    alpha = placed.source.to(values)[None, None]
    weighted, weight = sample_at(torch.cat([values * alpha, alpha], 1), placed.points, size).split(
        [values.shape[1], 1], 1
    )
    carried = weighted / weight.clamp(min=RESIDUE)
    if placed.hard:
        nearest, own = sample_at(torch.cat([values, alpha], 1), placed.points, size, "nearest").split(
            [values.shape[1], 1], 1
        )
        carried = torch.where(own >= 0.5, nearest, carried)
    # A look reaches as far as its own object does; beyond, it continues smoothly.
    return carried if placed.keeps else fill(carried, touched(weight).to(carried))


def finish(image: Tensor, result: EditResult, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the edited IMAGE (1, H, W, 3); every pixel where `result.mask` is 0 is the original's, bit for bit.

    What the VAE loses is put back: objects that were carried in pixels get the difference between the draft and its decoded self.
    `decode` (latents -> IMAGE) may give padded or reduced images (see `fit`); they are cropped and scaled back.
    """
    size = (image.shape[1], image.shape[2])
    edited = to_size(decode(result.latents), size)
    if result.draft is not None and result.draft_latents is not None:
        drafted, restore = result.draft.to(edited), result.restore[..., None].to(edited)
        change = edited - to_size(decode(result.draft_latents), size).to(edited)
        # Where the draft stays, a decoder still carries over a little of what changes elsewhere.
        change = torch.where(change.abs().amax(-1, keepdim=True) <= LEAST, 0.0, change)
        edited = (restore * (drafted + change) + (1 - restore) * edited).clamp(0, 1)
    return composite(image, edited.to(image), result.mask)


def to_size(decoded: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a decoded IMAGE (1, H', W', 3) scaled back and cropped to `size` (height, width)."""
    height, width = size
    scale = max(height / decoded.shape[1], width / decoded.shape[2])
    pixels = rearrange(decoded, "b h w c -> b c h w")
    if scale > 1:
        grown = (max(height, round(decoded.shape[1] * scale)), max(width, round(decoded.shape[2] * scale)))
        pixels = F.interpolate(pixels, grown, mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(pixels[..., :height, :width], "b c h w -> b h w c")
